"""A model directory goes in; scores, a JSON file and a sheet come out."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from fewstep.runtime.artefact import save_artefact
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import sana
from fewstep.training.autoencoder import AutoencoderConfig, build_autoencoder
from fewstep.training.data.packed import CaptionedImages
from fewstep.training.evaluation.evaluate import Evaluation, evaluate
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.model import evaluate_model, open_split
from fewstep.training.train_teacher import TeacherConfig, build_teacher


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student of 16x16 pixels and two steps."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("model") / "student"
    config = AutoencoderConfig(latent_channels=4, channels=(8, 8, 8, 8))
    transformer, vae = build_teacher(TeacherConfig(layers=1, heads=2, size=2), channels=4), build_autoencoder(config)
    card = {
        "kind": "student",
        "method": "dmd2",
        "steps": [2],
        "times": {"2": [1.0, 0.5, 0.0]},
        "sampler": "consistency",
        "guidance": 3.0,
    }
    directory.mkdir()
    save_artefact(directory, lambda folder: sana.save(folder, transformer, vae, 2), card)
    return directory


@pytest.fixture
def folder(data: CaptionedImages, tmp_path: Path) -> Path:
    """The tiny data as a folder of pictures: the last four shapes, in two styles each, are held out."""
    for position, image in enumerate(data.images):
        split = tmp_path / "data" / ("train" if position < 12 else "validation")
        split.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(split / f"{position:02}.png")
        row = {"file_name": f"{position:02}.png", "text": data.captions[position][0], "label": data.labels[position]}
        with (split / "metadata.jsonl").open("a") as metadata:
            metadata.write(json.dumps({**row, "style": data.styles[position]}) + "\n")
    return tmp_path / "data"


def run(student: Path, folder: Path, split: str, count: int = 8) -> Evaluation:
    return evaluate_model(
        student, folder, split, count, steps=None, sampler=None, guidance=None, seed=3, engine="torch", batch_size=5
    )


def test_a_student_is_scored_on_record(student: Path, folder: Path) -> None:
    evaluation = run(student, folder, "train", count=12)
    assert (evaluation.steps, evaluation.sampler, evaluation.engine) == (2, "consistency", "torch")
    assert (evaluation.split, evaluation.images, evaluation.seed) == ("train", 12, 3)
    assert evaluation.fd > 0
    name = "train-2-step-consistency-guidance-3-torch-12-images-seed-3"
    entry = json.loads((student / "evaluation" / f"{name}.json").read_text())
    floors = entry.pop("floors")
    assert entry == evaluation.as_dict()
    assert floors["halves"]["images"] == 6
    with Image.open(student / "evaluation" / f"{name}.png") as sheet:
        assert sheet.width > sheet.height > 500
    again = run(student, folder, "train", count=12)
    assert again.as_dict() | {"seconds": 0} == evaluation.as_dict() | {"seconds": 0}


def test_held_out_prompts_find_their_answer_in_the_gallery(folder: Path, network: FeatureNetwork) -> None:
    held_out, reference, gallery = open_split(folder, "validation", network, lambda stage, done, total: None)
    assert len(reference.shown) == 8
    assert len(gallery.shown) == 20
    known = {captions[0]: image for captions, image in zip(held_out.captions, held_out.images, strict=True)}

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        return torch.stack([known[prompt] for prompt in prompts]).permute(0, 2, 3, 1).numpy()

    evaluation = evaluate(generate, held_out, reference, gallery, network, count=8, seed=0)
    assert evaluation.match_style_at_1 == 1


def test_an_unknown_split_is_refused(student: Path, folder: Path) -> None:
    with pytest.raises(FewstepError, match='no split "test": choose from train, validation'):
        run(student, folder, "test")
