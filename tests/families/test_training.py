"""Every method trains a student of every family, which stock diffusers opens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.runtime import Pipeline
from fewstep.runtime.artefact import read_card
from fewstep.runtime.errors import FewstepError
from fewstep.training.methods import METHODS, get_method
from fewstep.training.recipe import StudentRecipe, overlay
from fewstep.training.train_student import train_student
from fewstep.training.trainer_config import TrainerConfig

TRAINER = TrainerConfig(iterations=1, warmup=1, precision="no", log_every=1)
CPU = torch.device("cpu")
Stock = Callable[[Path], Any]
FEW: dict[str, Any] = {"pairs": {"count": 4, "solver_steps": 2}, "teacher_steps": 4, "perceptual_weight": 0.0}
"""What keeps short the methods that have these fields, and without networks to download."""


CASES = [(method, family) for method in METHODS for family in ("stable_diffusion", "stable_diffusion_3")]


def train(method: str, teacher: Path, pictures: Path, student: Path, **changes: object) -> None:
    config = get_method(method).Config()
    few = {name: value for name, value in FEW.items() if hasattr(config, name)}
    recipe = StudentRecipe(overlay(config, {**few, **changes}, method), TRAINER, steps=2, batch_size=2)
    train_student(method, teacher, pictures, student, recipe, CPU)


@pytest.mark.parametrize(("method", "family"), [*CASES, ("dmd2", "stable_diffusion_2")])
def test_a_method_makes_a_student_that_diffusers_opens(
    request: pytest.FixtureRequest, stock: Stock, pictures: Path, tmp_path: Path, method: str, family: str
) -> None:
    teacher, student = request.getfixturevalue(family), tmp_path / "student"
    train(method, teacher, pictures, student)
    card = read_card(student)
    assert card.raw["teacher"] == {"weights": read_card(teacher).weights}
    assert card.weights != read_card(teacher).weights
    result = Pipeline.from_pretrained(student, engine="torch").generate("a red square", seed=1)
    assert result.arrays.shape == (1, 16, 16, 3)
    image = stock(student)("a red square", num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert image.shape == (1, 16, 16, 3)


def test_a_student_of_several_guidance_scales(
    stock: Stock, stable_diffusion: Path, pictures: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    train("lcm", stable_diffusion, pictures, student, guidance_range=(2.0, 9.0))
    assert read_card(student).guidance_range == (2.0, 9.0)
    pipeline = Pipeline.from_pretrained(student, engine="torch")
    assert pipeline.generate("a red square", guidance=9.0).arrays.shape == (1, 16, 16, 3)
    assert stock(student).unet.config.time_cond_proj_dim == 256


def test_a_family_without_an_input_for_it_cannot_learn_several_scales(
    stable_diffusion_3: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(FewstepError, match="SD3Transformer2DModel has no guidance input"):
        train("lcm", stable_diffusion_3, pictures, tmp_path / "student", guidance_range=(2.0, 9.0))
