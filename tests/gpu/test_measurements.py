"""Every section of `make gpu` on the CPU, with tiny networks: what it measures, never how fast."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import picture
import pytest
import torch
from end_to_end import VARIANTS, Bench, Setting, measurements
from students import (
    STUDENTS,
    Student,
    built_in,
    random_condition,
    sana_1600m,
    stable_diffusion_1,
    stable_diffusion_xl,
)
from timeline import Timeline
from training_steps import measurements as trainings

from fewstep.kernels.benchmarks.report import Report
from fewstep.kernels.dispatch import fused_everywhere
from fewstep.runtime.samplers.grid import grid
from fewstep.runtime.schedule import uniform_times
from fewstep.training.autoencoder import AutoencoderConfig
from fewstep.training.teacher import TeacherConfig

CPU, TINY = torch.device("cpu"), TeacherConfig(layers=1, heads=2)
SMALL = Setting(CPU, torch.float32, backend="eager", seconds=0.0)
STAGES = {"sampler", "denoiser", "decoder", "conversion", "copy to host"}
UNET = {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 4, "cross_attention_dim": 8}


def small_sd() -> Student:
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return stable_diffusion_1(**UNET, down_block_types=down, up_block_types=up)


def small_sdxl() -> Student:
    return stable_diffusion_xl(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def small_sana() -> Student:
    autoencoder = {
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (0, 1),
        "decoder_layers_per_block": (0, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
    }
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2}
    widths = {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8, "num_layers": 1}
    return sana_1600m(autoencoder, **heads, **widths, in_channels=4, out_channels=4, sample_size=4)


def small_built_in() -> Student:
    shape = AutoencoderConfig(latent_channels=4, channels=(8, 8), encoder_layers=(0, 1), decoder_layers=(0, 1))
    return built_in(TINY, shape)


@pytest.fixture
def fused() -> Iterator[None]:
    """Patched layers run their operations, as on a GPU."""
    with fused_everywhere():
        yield


BUILDERS = {"SD1.5": small_sd, "SDXL": small_sdxl, "Sana": small_sana, "built-in": small_built_in}


@pytest.mark.parametrize(
    ("name", "millions", "pixels"),
    [("SD1.5", 860, 512), ("SDXL", 2567, 1024), ("Sana", 1604, 512), ("built-in", 7, 64)],
)
def test_students_are_as_large_as_those_deployed(name: str, millions: int, pixels: int) -> None:
    with torch.device("meta"), torch.inference_mode():
        student = STUDENTS[name]()
        condition = random_condition(student, 2, torch.device("meta"), torch.float32)
        x_0 = student.call(student.network)(torch.randn(2, *student.sample_shape), torch.ones(2), condition)
        assert student.decoder(x_0).shape == (2, 3, pixels, pixels)
    assert sum(weight.numel() for weight in student.network.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
    # Wherever the network is: a sampler's coefficients are numbers to the device.
    assert {each.alpha.device.type for each in grid(student.schedule, uniform_times(4))} == {"cpu"}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the built-in student."""
    file = tmp_path_factory.mktemp("generated") / "end_to_end.json"
    Report(file, 120).measure(measurements({"built-in": small_built_in}, SMALL, batches=(1,), steps=(2,)))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on both methods, with kernels and without."""
    file = tmp_path_factory.mktemp("trained") / "training.json"
    Report(file, 120).measure(trainings(CPU, (2,), network=TINY, precision="no", warm_up=1, iterations=2))
    return file


def test_a_student_is_measured_in_every_variant(generated: Path) -> None:
    content = json.loads(generated.read_text())
    assert content["failed"] == {}
    rows = content["rows"]
    assert [row["variant"] for row in rows[::2]] == [row["variant"] for row in rows[1::2]] == list(VARIANTS)
    for whole, parts in zip(rows[::2], rows[1::2], strict=True):
        assert (whole["student"], whole["batch"], whole["steps"]) == ("built-in", 1, 2)
        assert whole["images_per_second"] == pytest.approx(1000 / whole["milliseconds"], rel=0.05)
        assert parts["stages"].keys() == STAGES
        assert 0.9 < parts["accounted"] <= 1


@pytest.mark.parametrize("build", BUILDERS.values())
def test_all_variants_draw_the_same_pictures_in_the_same_stages(build: Callable[[], Student], fused: None) -> None:
    """Compiled is the built-in student only, for the time it takes."""
    torch.manual_seed(0)
    bench = Bench(build(), SMALL)
    pictures = []
    for variant in VARIANTS.values():
        if not variant.compiled or build is small_built_in:
            stages: list[str] = []
            with bench.generation(variant, batch=2, steps=2) as generate:
                pictures.append(generate(stages.append).int())
            assert set(stages) == STAGES | {"start"}
    assert pictures[0].shape[0] == 2
    assert pictures[0].shape[3] == 3
    for other in pictures[1:]:
        assert (other - pictures[0]).abs().max() <= 1  # of 255: rounding


def test_a_timeline_adds_up_the_turns_of_a_stage() -> None:
    timeline = Timeline(CPU)
    timeline.marks = [("start", 1.0), ("sampler", 1.1), ("denoiser", 1.4), ("sampler", 1.6)]
    assert timeline.milliseconds() == pytest.approx({"sampler": 300.0, "denoiser": 300.0})


def test_training_is_the_same_with_kernels_on_a_cpu(trained: Path) -> None:
    content = json.loads(trained.read_text())
    assert content["failed"] == {}
    rows = content["rows"]
    assert [(row["method"], row["kernels"]) for row in rows] == [
        (method, kernels) for method in ("dmd2", "flow matching") for kernels in (False, True)
    ]
    for without, having in zip(rows[::2], rows[1::2], strict=True):
        losses = [[{**point, "seconds": 0} for point in row["curve"]] for row in (without, having)]
        assert losses[0] == losses[1]
        assert any(name.endswith("loss") for point in having["curve"] for name in point)
        assert having["layers"]
        assert not without["layers"]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2 * row["iterations_per_second"], abs=0.1)
        assert row["iterations_per_second"] > 0


def test_pictures_are_drawn_of_what_was_measured(
    generated: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    times = {"kernel": 2.0, "compiled": 3.0, "eager": 4.0, "copy": 1.0}
    kernel = {"operation": "norm", "model": "SDXL", "where": "8", "pass": "forward", "microseconds": times}
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [{**kernel, "fraction_of_ceiling": 0.5}]}))
    for report in (generated, trained):
        (tmp_path / report.name).write_bytes(report.read_bytes())
    picture.main(tmp_path)
    assert {file.name for file in tmp_path.glob("*.png")} == {"kernels.png", "end_to_end.png", "training.png"}
    picture.main(tmp_path / "nothing")
    assert capsys.readouterr().out.count("drew") == 3
