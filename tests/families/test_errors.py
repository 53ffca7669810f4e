"""Directories that cannot be used are refused in one sentence that names the part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.runtime import Pipeline
from fewstep.runtime.artefact import read_card
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import load_model

CPU = torch.device("cpu")


def remove(part: str) -> Callable[[Path], None]:
    return lambda directory: shutil.rmtree(directory / part)


def cut_short(file: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(content[: len(content) // 2])

    return damage


def drop_a_weight(file: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        weights = load_file(directory / file)
        weights.pop(sorted(weights)[0])
        save_file(weights, directory / file, {"format": "pt"})

    return damage


def change_index(**parts: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        index = json.loads((directory / "model_index.json").read_text())
        index.update(parts)
        changed = {name: part for name, part in index.items() if part is not None}
        (directory / "model_index.json").write_text(json.dumps(changed))

    return damage


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove("vae"), "vae: it has no config.json"),
        (cut_short("vae/diffusion_pytorch_model.safetensors"), "cannot load .*vae: "),
        (drop_a_weight("vae/diffusion_pytorch_model.safetensors"), "vae: its weights and its config.json differ in "),
        (remove("scheduler"), r"cannot read .*scheduler_config\.json"),
        (remove("text_encoder"), "text_encoder: it has no config.json"),
        (cut_short("text_encoder/model.safetensors"), "cannot load .*text_encoder: "),
        (drop_a_weight("text_encoder/model.safetensors"), "text_encoder: its weights and its config.json differ in "),
        (remove("tokenizer"), "tokenizer: it has no vocabulary"),
        (cut_short("tokenizer/tokenizer.json"), "cannot load .*tokenizer: "),
        (change_index(text_encoder=["transformers", "Unheard"]), "transformers has no Unheard"),
        (change_index(tokenizer=None), r"its model_index\.json lacks a part \(.*tokenizer"),
        (change_index(_class_name="KolorsPipeline"), "holds a KolorsPipeline: supported are SanaPipeline"),
    ],
)
def test_a_damaged_directory_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, damage: Callable[[Path], None], sentence: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(family), directory)
    damage(directory)
    with pytest.raises(FewstepError, match=sentence) as refused:
        Pipeline.from_pretrained(directory).generate("a cat", steps=1)
    assert "\n" not in str(refused.value)


def test_t5_may_be_missing_although_the_index_lists_it(stable_diffusion_3_with_t5: Path, tmp_path: Path) -> None:
    """Its folders are often left out of a download."""
    directory = tmp_path / "model"
    shutil.copytree(stable_diffusion_3_with_t5, directory)
    before = load_model(directory, CPU).load_text_encoder()
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(directory / part)
    after = load_model(directory, CPU).load_text_encoder()
    assert after.identity != before.identity
    with_t5, without = (encoder(["a cat"])["encoder_hidden_states"] for encoder in (before, after))
    assert with_t5.shape == without.shape
    assert torch.equal(with_t5[:, :16], without[:, :16])
    assert with_t5[:, 16:].any()
    assert not without[:, 16:].any()


def test_a_family_that_is_ours_needs_its_card(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(FewstepError, match=r"holds no fewstep\.json"):
        read_card(tmp_path)


def test_a_directory_without_an_index_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"holds no fewstep\.json"):
        read_card(tmp_path)
