"""Students of every family: saved with the teacher's parts, opened by stock diffusers, and drawing the same there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime import Pipeline
from fewstep.runtime.artefact import read_card
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import family_of, load_model, sana, stable_diffusion
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import uniform_times
from fewstep.runtime.trajectory import Trajectory
from fewstep.training.distribution_matching import FeatureHead, call_with_features

from ..family_models import save_student
from ..tiny_models import tiny_transformer

PROMPTS = ["a red cat", "two blue leaves in a wood"]
CPU = torch.device("cpu")
Stock = Callable[[Path], Any]


@pytest.fixture(params=["stable_diffusion", "stable_diffusion_2", "stable_diffusion_3"])
def teacher(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def guided_student(stable_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of four steps that takes the guidance scale."""
    return save_student(tmp_path_factory.mktemp("student") / "guided", stable_diffusion, [4], guided=True)


def ours(directory: Path, noise: Tensor, **more: Tensor) -> Tensor:
    model, card = load_model(directory, CPU), read_card(directory)
    trajectory = Trajectory(model, get_sampler(card.sampler), card.times[str(card.steps[0])])
    with torch.inference_mode():
        return trajectory(noise, **model.load_text_encoder()(PROMPTS), **more)


def theirs(pipeline: Any, noise: Tensor, steps: int, seed: int, guidance: float = 1.0) -> Any:
    spacing: dict[str, Any] = {"num_inference_steps": steps}
    if "3" in type(pipeline).__name__:
        spacing = {"sigmas": uniform_times(steps)[:-1]}
    torch.manual_seed(seed)
    torch.randn_like(noise[:, 0])  # its scheduler goes on drawing where the first noise ended
    return pipeline(PROMPTS, guidance_scale=guidance, latents=noise[:, 0], output_type="pt", **spacing).images


def draws(steps: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.stack([torch.randn(2, 4, 8, 8) for _ in range(steps)], dim=1)


@pytest.mark.parametrize(("steps", "sampler"), [(1, "consistency"), (4, "consistency"), (2, "ddim")])
def test_stock_diffusers_opens_a_student_and_draws_the_same(
    stock: Stock, teacher: Path, tmp_path: Path, steps: int, sampler: str
) -> None:
    directory = save_student(tmp_path / "student", teacher, [steps], sampler=sampler)
    noise = draws(steps, seed=5)
    expected = ours(directory, noise)
    torch.testing.assert_close(theirs(stock(directory), noise, steps, seed=5), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01


def test_a_student_has_the_teachers_parts_and_generates_from_words(teacher: Path, tmp_path: Path) -> None:
    directory = save_student(tmp_path / "student", teacher, [2])
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (teacher / part).iterdir():
            assert (directory / part / file.name).read_bytes() == file.read_bytes()
    result = Pipeline.from_pretrained(directory, engine="torch").generate(PROMPTS, seed=4)
    assert result.arrays.shape == (2, 16, 16, 3)
    assert result.steps == 2


def test_a_part_that_the_teacher_lists_but_lacks_is_left_out_of_the_students_index(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    teacher.symlink_to(stable_diffusion)
    index = json.loads((teacher / "model_index.json").read_text())
    changed = tmp_path / "changed"
    changed.mkdir()
    for part in teacher.iterdir():
        if part.is_dir():
            (changed / part.name).symlink_to(part)
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (changed / "model_index.json").write_text(json.dumps(index))
    directory = save_student(tmp_path / "student", changed, [1])
    assert json.loads((directory / "model_index.json").read_text())["safety_checker"] == [None, None]


def test_stock_diffusers_gives_the_same_scale_to_a_student_that_takes_it(stock: Stock, guided_student: Path) -> None:
    noise, images = draws(4, seed=6), []
    for scale in (2.0, 8.0):
        images.append(ours(guided_student, noise, guidance=torch.full((2,), scale)))
        expected = theirs(stock(guided_student), noise, 4, seed=6, guidance=scale)
        torch.testing.assert_close(images[-1], expected, rtol=0, atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 0.01


def test_a_pipeline_gives_the_scale_on_within_the_range_that_the_student_knows(guided_student: Path) -> None:
    pipeline = Pipeline.from_pretrained(guided_student, engine="torch")
    default, same, other = (pipeline.generate(PROMPTS, guidance=scale).arrays.astype(int) for scale in (None, 3.0, 9.0))
    np.testing.assert_array_equal(default, same)
    assert np.abs(default - other).max() > 1
    with pytest.raises(FewstepError, match="knows guidance from 2 to 9: 1 lies outside"):
        pipeline.generate(PROMPTS, guidance=1.0)
    with pytest.raises(FewstepError, match="leave both out"):
        pipeline.generate(PROMPTS, sampler="euler")


def test_a_network_that_takes_the_scale_is_not_called_without(guided_student: Path) -> None:
    with pytest.raises(FewstepError, match="must give a guidance_range"):
        ours(guided_student, draws(4, seed=6))


def test_the_scale_is_embedded_as_diffusers_embeds_it() -> None:
    from diffusers import StableDiffusionPipeline

    scales = torch.tensor([1.0, 3.0, 7.5, 15.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, 256)
    assert torch.equal(stable_diffusion.embed_guidance(scales, 256), expected)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_2", "sana"])
def test_a_copy_with_a_guidance_input_gives_what_the_teacher_gives_until_it_is_trained(
    request: pytest.FixtureRequest, family: str
) -> None:
    network, module, shape, condition = parts_of(request, family)
    copy = module.with_guidance_input(network)
    x, time = torch.randn(3, *shape), torch.tensor([999.0, 500.0, 1.0])
    scales = torch.tensor([1.0, 3.0, 7.5])
    expected = module.network_call(network)(x, time, condition)
    output = module.network_call(copy)(x, time, {**condition, "guidance": scales})
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    loss = output.square().mean()
    new = copy.get_parameter(
        "time_embed.guidance_embedder.linear_2.weight" if family == "sana" else "time_embedding.cond_proj.weight"
    )
    assert torch.autograd.grad(loss, new)[0].any()  # and it can learn to look at it
    again = module.with_guidance_input(copy)
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in again.state_dict().items())


def parts_of(request: pytest.FixtureRequest, family: str) -> tuple[nn.Module, Any, tuple[int, ...], dict[str, Tensor]]:
    """Network, family module, latent shape and a condition of three prompts."""
    if family == "sana":
        mask = (torch.arange(5) < torch.tensor([[2], [5], [1]])).long()
        condition = {"encoder_hidden_states": torch.randn(3, 5, 384), "encoder_attention_mask": mask}
        return tiny_transformer(), sana, (4, 4, 4), condition
    model = load_model(request.getfixturevalue(family), CPU)
    condition = model.load_text_encoder()([*PROMPTS, ""])
    return model.network, family_of(request.getfixturevalue(family)), model.sample_shape, condition


def test_stable_diffusion_3_has_no_guidance_input(stable_diffusion_3: Path) -> None:
    with pytest.raises(FewstepError, match="SD3Transformer2DModel has no guidance input"):
        family_of(stable_diffusion_3).with_guidance_input(load_model(stable_diffusion_3, CPU).network)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3", "sana"])
def test_a_discriminator_sees_features_of_the_image(request: pytest.FixtureRequest, family: str) -> None:
    network, module, shape, condition = parts_of(request, family)
    block, channels = module.feature_block(network)
    x, time = torch.randn(3, *shape, requires_grad=True), torch.tensor([999.0, 500.0, 1.0])
    _, features = call_with_features(block, lambda: module.network_call(network)(x, time, condition))
    logits = FeatureHead(channels)(features)
    assert logits.shape == (3,)
    assert torch.autograd.grad(logits.sum(), x)[0].any()
