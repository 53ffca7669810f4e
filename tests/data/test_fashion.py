import gzip
import json
from pathlib import Path

import numpy
import pytest

from fewstep.runtime.errors import FewstepError
from fewstep.training.data.fashion import CLASSES, build_fashion
from fewstep.training.data.packed import load_captioned_images


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for prefix, count in (("train", 10), ("t10k", 4)):
        pixels = generator.integers(0, 256, (count, 28, 28), numpy.uint8)
        lengths = b"".join(length.to_bytes(4, "big") for length in pixels.shape)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x03" + lengths + pixels.tobytes())
        )
        labels = bytes(range(count))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01" + lengths[:4] + labels))
        numpy.save(tmp_path / f"{prefix}.npy", pixels)
    return folder


def test_pictures_are_padded_with_black_and_keep_their_pixels(source: Path, tmp_path: Path) -> None:
    summary = build_fashion(tmp_path / "fashion", source=source)
    assert summary["counts"] == {"train": 10, "validation": 4}
    assert summary == json.loads((tmp_path / "fashion" / "dataset.json").read_text())
    for split, prefix in (("train", "train"), ("validation", "t10k")):
        packed = load_captioned_images(tmp_path / "fashion", split)
        assert packed.images.shape[1:] == (3, 32, 32)
        expected = numpy.pad(numpy.load(tmp_path / f"{prefix}.npy"), ((0, 0), (2, 2), (2, 2)))
        assert (packed.images.numpy() == expected[:, None]).all()
        assert packed.labels == CLASSES[: len(expected)]
        assert packed.captions == tuple((name,) for name in packed.labels)
        assert set(packed.styles) == {"fashion"}


def test_a_missing_package_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="is missing: run apt-get install dataset-fashion-mnist"):
        build_fashion(tmp_path / "fashion", source=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(source: Path, tmp_path: Path) -> None:
    file = source / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FewstepError, match=r"t10k-images-idx3-ubyte\.gz is damaged: reinstall"):
        build_fashion(tmp_path / "fashion", source=source)
