import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fewstep.runtime.errors import FewstepError
from fewstep.training.data.emoji import build_emoji
from fewstep.training.data.packed import CaptionedImages, load_captioned_images

CAPTIONS = {"a": "a red barn", "b": "two ducks, swimming", "c": "späte Sonne"}


def picture(name: str, size: tuple[int, int] = (12, 12)) -> Image.Image:
    pixels = numpy.random.default_rng(ord(name)).integers(0, 256, (size[1], size[0], 3), numpy.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def assert_holds_the_pictures(packed: CaptionedImages) -> None:
    assert packed.images.dtype == torch.uint8
    assert torch.equal(packed.images, torch.stack([pixels_of(picture(name)) for name in CAPTIONS]))
    assert packed.captions == tuple((caption,) for caption in CAPTIONS.values())


def write_caption_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in CAPTIONS.items():
        picture(name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def write_jsonl(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for name, caption in CAPTIONS.items():
            picture(name).save(folder / f"{name}.png")
            metadata.write(json.dumps({"file_name": f"{name}.png", "text": caption}, ensure_ascii=False) + "\n")


def write_csv(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = ["file_name,caption"]
    for name, caption in CAPTIONS.items():
        picture(name).save(folder / "pictures" / f"{name}.png")
        rows.append(f'pictures/{name}.png,"{caption}"')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_shards(folder: Path, prefix: str = "pictures") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate((["a", "b"], ["c"])):
        with tarfile.open(folder / f"{prefix}-{number:05}.tar", "w") as archive:
            for name in names:
                encoded = io.BytesIO()
                picture(name).save(encoded, "PNG")
                add(archive, f"./{name}.png", encoded.getvalue())
                caption = CAPTIONS[name]
                if name == "b":
                    add(archive, f"./{name}.json", json.dumps({"caption": caption, "label": None}).encode())
                else:
                    add(archive, f"./{name}.txt", caption.encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("write", [write_caption_files, write_jsonl, write_csv, write_shards])
@pytest.mark.parametrize("subfolder", ["", "train"])
def test_every_form_gives_the_same_data(write: Callable[[Path], None], subfolder: str, tmp_path: Path) -> None:
    write(tmp_path / "given" / subfolder)
    write_caption_files(tmp_path / "reference")
    packed = load_captioned_images(tmp_path / "given")
    assert_holds_the_pictures(packed)
    assert packed.labels == packed.styles == ("", "", "")
    assert packed.identity == load_captioned_images(tmp_path / "reference").identity


def test_shards_are_split_by_their_names(tmp_path: Path) -> None:
    write_shards(tmp_path, "train")
    with tarfile.open(tmp_path / "validation-00000.tar", "w") as archive:
        encoded = io.BytesIO()
        picture("d").save(encoded, "PNG")
        add(archive, "d.png", encoded.getvalue())
        add(archive, "d.txt", b"a door")
    assert_holds_the_pictures(load_captioned_images(tmp_path))
    assert load_captioned_images(tmp_path, "validation").captions == (("a door",),)


def test_the_emoji_build_is_packed_bit_for_bit(node_modules: Path, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    build_emoji(out, size=16, styles=["noto", "twemoji"], packages=node_modules)
    for split in ("train", "validation"):
        packed = load_captioned_images(out, split)
        rows = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        rows.sort(key=lambda row: str(row["file_name"]))
        assert packed.captions == tuple(tuple(row["captions"]) for row in rows)
        assert packed.labels == tuple(row["codepoint"] for row in rows)
        assert packed.styles == tuple(row["style"] for row in rows)
        for pixels, row in zip(packed.images, rows, strict=True):
            with Image.open(out / split / row["file_name"]) as image:
                assert torch.equal(pixels, pixels_of(image))


def test_the_second_load_reads_the_packed_file(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    first = load_captioned_images(tmp_path)
    (cache,) = (tmp_path / ".packed").iterdir()
    written = cache.stat().st_mtime_ns
    second = load_captioned_images(tmp_path)
    assert cache.stat().st_mtime_ns == written
    assert torch.equal(first.images, second.images)
    assert (first.captions, first.labels, first.identity) == (second.captions, second.labels, second.identity)


def test_a_change_of_the_data_packs_again_and_drops_the_old_file(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    before = load_captioned_images(tmp_path)
    (tmp_path / "a.txt").write_text("a much redder barn")
    after = load_captioned_images(tmp_path)
    assert after.captions[0] == ("a much redder barn",)
    assert after.identity != before.identity
    assert len(list((tmp_path / ".packed").iterdir())) == 1


def test_a_damaged_packed_file_is_written_again(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    load_captioned_images(tmp_path)
    (cache,) = (tmp_path / ".packed").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    assert_holds_the_pictures(load_captioned_images(tmp_path))
    assert_holds_the_pictures(load_captioned_images(tmp_path))


def test_a_folder_that_cannot_be_written_is_packed_in_memory(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    (tmp_path / ".packed").write_text("a file where the folder would go")
    assert_holds_the_pictures(load_captioned_images(tmp_path))


def test_pictures_are_cropped_to_their_centre_and_resized(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    picture("t", (20, 40)).save(tmp_path / "tall.png")
    for name in ("wide", "tall"):
        (tmp_path / f"{name}.txt").write_text(name)
    tall, wide_pixels = load_captioned_images(tmp_path, size=5).images
    assert torch.equal(wide_pixels, torch.tensor([0, 0, 255]).view(3, 1, 1).expand(3, 5, 5))
    centre = picture("t", (20, 40)).crop((0, 10, 20, 30)).resize((5, 5), Image.Resampling.LANCZOS)
    assert torch.equal(tall, pixels_of(centre))


def test_transparency_becomes_white_and_orientation_is_applied(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture("u", (4, 4)).save(tmp_path / "turned.webp", lossless=True, exif=orientation(3))
    for name in ("clear", "turned"):
        (tmp_path / f"{name}.txt").write_text(name)
    clear, turned = load_captioned_images(tmp_path).images
    assert (clear == 255).all()
    assert torch.equal(turned, pixels_of(picture("u", (4, 4)).rotate(180)))


def test_sixteen_bit_grey_keeps_its_upper_eight_bits(tmp_path: Path) -> None:
    levels = numpy.arange(16, dtype=numpy.uint16).reshape(4, 4) * 4096 + 255
    Image.fromarray(levels).save(tmp_path / "deep.png")
    (tmp_path / "deep.txt").write_text("a ramp")
    (ramp,) = load_captioned_images(tmp_path).images.numpy()
    assert (ramp == levels // 256).all()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"there is no folder .*nowhere"):
        load_captioned_images(tmp_path / "nowhere")


def test_an_unknown_split_says_which_there_are(tmp_path: Path) -> None:
    write_caption_files(tmp_path / "whole")
    with pytest.raises(FewstepError, match=r'no split "validation": choose from train$'):
        load_captioned_images(tmp_path / "whole", "validation")
    for split in ("train", "validation"):
        write_caption_files(tmp_path / "parts" / split)
    with pytest.raises(FewstepError, match=r'no split "test": choose from train, validation$'):
        load_captioned_images(tmp_path / "parts", "test")


def test_a_folder_without_pictures_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(FewstepError, match="holds no pictures"):
        load_captioned_images(tmp_path)


def test_pictures_without_captions_are_counted_and_one_is_named(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(FewstepError, match=r"2 of 3 pictures in .* have no caption, .*b\.png for one"):
        load_captioned_images(tmp_path)


def test_a_corrupt_picture_is_named(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    file = tmp_path / "b.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(FewstepError, match=r"b\.png does not open as a picture \(OSError\)"):
        load_captioned_images(tmp_path)


def test_a_corrupt_picture_in_a_shard_is_named_with_its_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pictures-0.tar", "w") as archive:
        add(archive, "a.png", b"not a picture")
        add(archive, "a.txt", b"a caption")
    with pytest.raises(FewstepError, match=r"pictures-0\.tar:a\.png does not open as a picture"):
        load_captioned_images(tmp_path)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "pictures-0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(FewstepError, match=r"pictures-0\.tar is not a readable WebDataset shard"):
        load_captioned_images(tmp_path)


def test_sizes_that_differ_need_a_size(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    picture("c", (9, 11)).save(tmp_path / "c.png")
    with pytest.raises(FewstepError, match=r"differ in size \(.*c\.png is 9 pixels, not 12\): give a size"):
        load_captioned_images(tmp_path)
    assert load_captioned_images(tmp_path, size=8).images.shape == (3, 3, 8, 8)


@pytest.mark.parametrize("line", ['{"text": "no file name"}', "not json", "[1]"])
def test_a_broken_metadata_file_is_named(line: str, tmp_path: Path) -> None:
    picture("a").save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(FewstepError, match=r"metadata\.jsonl is not a table with a file_name in each row"):
        load_captioned_images(tmp_path)


def test_a_row_without_its_picture_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(FewstepError, match=r"a metadata file names .*b\.png, which is no picture there"):
        load_captioned_images(tmp_path)


def test_a_caption_that_is_not_text_is_named(tmp_path: Path) -> None:
    write_caption_files(tmp_path)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FewstepError, match=r"c\.txt is not UTF-8 text"):
        load_captioned_images(tmp_path)
