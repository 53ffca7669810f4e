"""The card: what is hashed, what engines are keyed on, and saves that end early."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fewstep.runtime.artefact import Card, read_card, save_artefact, weights_hash
from fewstep.runtime.errors import FewstepError

CARD: dict[str, Any] = {
    "kind": "student",
    "method": "none",
    "steps": [1, 2],
    "times": {"1": [1.0, 0.0], "2": [1.0, 0.5, 0.0]},
    "sampler": "consistency",
    "guidance": 3.0,
}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def write(folder: Path) -> None:
    for part in PARTS:
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(part)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": ["a", "B"], "image_encoder": [None, None]}
    index.update({part: ["a", "B"] for part in PARTS})
    (folder / "model_index.json").write_text(json.dumps(index))


def saved(directory: Path, **changes: object) -> Card:
    save_artefact(directory, write, {**CARD, **changes})
    return read_card(directory)


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_told_apart_by_every_part_that_draws(tmp_path: Path, part: str) -> None:
    assert saved(tmp_path).weights == weights_hash(tmp_path)
    (tmp_path / part / "config.json").write_text("another")
    assert saved(tmp_path / "again").weights != weights_hash(tmp_path)


def test_weights_are_the_same_whatever_does_not_draw(tmp_path: Path) -> None:
    before = saved(tmp_path).weights
    (tmp_path / "safety_checker" / "config.json").write_text("another")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "curve.jsonl").write_text("")
    assert weights_hash(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [{"sampler": "ddim"}, {"times": {**CARD["times"], "2": [1.0, 0.6, 0.0]}}],
    ids=["sampler", "times"],
)
def test_engines_are_built_from_times_and_sampler_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    before, after = saved(tmp_path / "before"), saved(tmp_path / "after", **changes)
    assert before.weights == after.weights
    assert before.engine_key(2) != after.engine_key(2)
    assert (before.engine_key(1) == after.engine_key(1)) == ("times" in changes)
    assert before.engine_key(1) != before.engine_key(2)


def test_the_range_of_scales_that_a_student_knows(tmp_path: Path) -> None:
    assert saved(tmp_path).guidance_range is None
    assert saved(tmp_path, guidance_range=[2, 9]).guidance_range == (2.0, 9.0)


@pytest.mark.parametrize("limits", [[9, 2], [1], 3, ["low", "high"]])
def test_a_range_that_is_none_is_refused(tmp_path: Path, limits: object) -> None:
    with pytest.raises(FewstepError, match=r"fewstep\.json lacks or misstates"):
        saved(tmp_path, guidance_range=limits)


def test_an_interrupted_save_never_looks_like_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    rename, moved = Path.rename, []

    def fails_at_the_third(self: Path, target: Path) -> Path:
        moved.append(self)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, sampler="ddim")
    assert not (tmp_path / "model_index.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_save_that_cannot_write_its_parts_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    before = saved(tmp_path)

    def fails(folder: Path) -> None:
        write(folder)
        shutil.rmtree(folder / "vae")
        raise FewstepError("the disk is full")

    with pytest.raises(FewstepError, match="disk"):
        save_artefact(tmp_path, fails, CARD)
    assert read_card(tmp_path) == before
    assert weights_hash(tmp_path) == before.weights


def test_folders_that_the_new_model_lacks_go_and_what_no_model_wrote_stays(tmp_path: Path) -> None:
    def write_with_adapter(folder: Path) -> None:
        write(folder)
        (folder / "lora").mkdir()

    for name in ("training", "evaluation", "engines"):
        (tmp_path / name).mkdir()
    save_artefact(tmp_path, write_with_adapter, CARD)
    assert (tmp_path / "lora").is_dir()
    saved(tmp_path)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {*PARTS, "safety_checker", "training", "evaluation", "engines"}
