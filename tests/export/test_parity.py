"""Parity names the first part that departs, the image that shows it and by how much; the gate leaves the evidence."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.export.differences import (
    END_TO_END,
    TOLERANCES,
    beyond,
    image_measures,
    pixel_measures,
    tensor_measures,
    worst,
)
from fewstep.export.export import TARGETS
from fewstep.export.gate import Gate
from fewstep.export.parity import BATCHES, LARGEST_DROP, PROMPTS, ParityReport, Trial, check_parity
from fewstep.runtime.engines import PRECISIONS, TEXT_ENCODER, TRAJECTORY, Arrays, Engines
from fewstep.runtime.engines.manifest import QUANTISED
from fewstep.runtime.errors import FewstepError

SIDE = 16


class Tokenize:
    """Each prompt's length, as the only token."""

    def __call__(self, prompts: Sequence[str]) -> dict[str, Any]:
        ids = torch.tensor([[len(prompt)] for prompt in prompts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encode(input_ids: Any, attention_mask: Any) -> Arrays:
    return {"encoder_hidden_states": np.sin(input_ids * np.arange(1, 9)).astype(np.float32)[:, None]}


def draw(noise: Any, encoder_hidden_states: Any, encoder_attention_mask: Any) -> Arrays:
    brightness = 128 + 40 * noise[:, 0].transpose(0, 2, 3, 1) + 20 * encoder_hidden_states[:, :, None, :1]
    return {"pixels": np.clip(np.round(brightness), 0, 255).astype(np.uint8)}


TORCH = Engines("torch", draw, encode, draws=1, sample_shape=(3, SIDE, SIDE))


def engine(
    encoder: Callable[..., Arrays] = encode, trajectory: Callable[..., Arrays] = draw, name: str = "onnx"
) -> Engines:
    return replace(TORCH, name=name, text_encoder=encoder, trajectory=trajectory)


def check(engines: Engines, precision: str = "fp32", score: Any = None) -> tuple[ParityReport, Trial]:
    return check_parity(TORCH, engines, Tokenize(), precision, score)


def brighter(by: int, from_seed: int = 0) -> Callable[..., Arrays]:
    """A trajectory with other pixels in the images of later seeds, which come in larger batches."""

    def trajectory(**arrays: Any) -> Arrays:
        pixels = draw(**arrays)["pixels"].astype(int)
        first = {1: 0, 3: 1, 8: 4}[len(pixels)]
        wrong = first + np.arange(len(pixels)) >= from_seed
        return {"pixels": np.where(wrong[:, None, None, None], pixels + by, pixels).clip(0, 255).astype(np.uint8)}

    return trajectory


def test_equal_engines_pass_and_all_images_count() -> None:
    report, trial = check(engine())
    assert report.failure is None
    assert report.images == sum(BATCHES) == 12
    assert report.worst == {
        TEXT_ENCODER: {"largest": 0.0, "rms": 0.0},
        TRAJECTORY: {"largest": 0.0, "rms": 0.0},
        END_TO_END: {"psnr": 200.0, "ssim": 1.0, "off": 0.0},
    }
    assert report.tolerance == TOLERANCES["fp32"]
    assert trial.seeds == range(4, 12)
    assert trial.prompts == [*PROMPTS, *PROMPTS]


def test_the_first_part_that_departs_is_named() -> None:
    wrong_states, _ = check(
        engine(lambda **tokens: {"encoder_hidden_states": -encode(**tokens)["encoder_hidden_states"]})
    )
    assert wrong_states.failure is not None
    assert wrong_states.failure.part == TEXT_ENCODER
    assert wrong_states.failure.case == f"{PROMPTS[0]!r} with seed 0 in a batch of 1"
    assert wrong_states.worst[TRAJECTORY]["rms"] == 0  # which is given torch's states
    assert wrong_states.worst[END_TO_END]["psnr"] < 40
    wrong_pixels, _ = check(engine(trajectory=brighter(9)))
    assert wrong_pixels.failure is not None
    assert wrong_pixels.failure.part == TRAJECTORY
    assert "its trajectory: largest 0.0353 where at most 0.00784" in wrong_pixels.failure.reason


def test_parts_that_pass_may_fail_together() -> None:
    def slightly(**tokens: Any) -> Arrays:
        return {"encoder_hidden_states": encode(**tokens)["encoder_hidden_states"] * np.float32(1 + 5e-5)}

    def sensitive(**arrays: Any) -> Arrays:
        states = arrays["encoder_hidden_states"]
        exact = np.isin(states[:, 0, 0], known)
        pixels = draw(**arrays)["pixels"]
        return {"pixels": np.where(exact[:, None, None, None], pixels, 255 - pixels)}

    known = encode(Tokenize()(PROMPTS)["input_ids"].numpy(), None)["encoder_hidden_states"][:, 0, 0]
    report, _ = check(engine(slightly, sensitive))
    assert report.failure is not None
    assert report.failure.part == END_TO_END
    assert "its text encoder and trajectory in turn: psnr " in report.failure.reason


def test_an_image_that_is_wrong_in_one_batch_only_is_found() -> None:
    report, trial = check(engine(trajectory=brighter(60, from_seed=6)))
    assert report.failure is not None
    assert report.failure.case == f"{PROMPTS[2]!r} with seed 6 in a batch of 8"
    np.testing.assert_array_equal(trial.inputs[TRAJECTORY]["noise"].shape, (8, 1, 3, SIDE, SIDE))


def fail(**arrays: Any) -> Arrays:
    raise RuntimeError("\n  cannot reshape [1, 2]\nand a page of this")


def one_image(**arrays: Any) -> Arrays:
    return {"pixels": draw(**arrays)["pixels"][:1]}


@pytest.mark.parametrize(
    ("trajectory", "reason"),
    [
        (fail, r"its trajectory cannot run: cannot reshape \[1, 2\]$"),
        (one_image, r"cannot run: it gives \(1, 16, 16, 3\) where torch gives \(3, 16, 16, 3\)$"),
    ],
)
def test_a_part_that_does_not_run_fails(trajectory: Callable[..., Arrays], reason: str) -> None:
    report, trial = check(engine(trajectory=trajectory))
    assert report.failure is not None
    assert report.failure.part == TRAJECTORY
    assert re.search(reason, report.failure.reason)
    assert END_TO_END not in trial.found


def test_not_a_number_fails() -> None:
    def overflow(**tokens: Any) -> Arrays:
        return {"encoder_hidden_states": np.full((len(tokens["input_ids"]), 1, 8), np.nan, np.float32)}

    report, _ = check(
        engine(overflow, lambda **arrays: draw(**(arrays | {"encoder_hidden_states": np.zeros((1, 1, 1))})))
    )
    assert report.failure is not None
    assert report.failure.part == TEXT_ENCODER
    assert np.isnan(report.worst[TEXT_ENCODER]["rms"])


@pytest.mark.parametrize(
    ("score", "passes"), [(0.5 - LARGEST_DROP / 2, True), (0.5 - 2 * LARGEST_DROP, False), (np.nan, False)]
)
def test_a_score_must_not_fall(score: float, passes: bool) -> None:
    report, _ = check(engine(), score=lambda engines: 0.5 if engines.name == "torch" else score)
    assert report.quality is not None
    assert report.quality.torch == 0.5
    assert (report.failure is None) == passes
    assert passes or (report.failure is not None and report.failure.part == "quality")


def test_nothing_is_scored_that_differs_anyway() -> None:
    report, _ = check(engine(trajectory=brighter(60)), score=lambda engines: pytest.fail("scored"))
    assert report.quality is None


def test_measures_are_in_the_units_that_they_claim() -> None:
    expected = np.array([[1.0, -2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    one, black = tensor_measures(expected + np.array([[0.5], [0.0]], np.float32), expected)
    assert one == pytest.approx({"largest": 0.25, "rms": 0.5 / 1.5})
    assert black == {"largest": 0.0, "rms": 0.0}
    black, off = np.zeros((2, SIDE, SIDE, 3), np.uint8), np.zeros((2, SIDE, SIDE, 3), np.uint8)
    off[0, :2] = 3
    off[1, :4] = 2
    first, second = image_measures(off, black)
    assert first["off"] == 2 / SIDE
    assert second["off"] == 0  # two bytes are not more than two
    assert first["psnr"] == pytest.approx(10 * np.log10(255**2 / (9 * 2 / SIDE)))
    assert pixel_measures(off, black)[0] == pytest.approx({"largest": 3 / 255, "rms": 3 / 255 * np.sqrt(2 / SIDE)})
    assert image_measures(black, black)[0] == {"psnr": 200.0, "ssim": 1.0, "off": 0.0}


def test_structure_counts_where_the_mean_difference_does_not() -> None:
    picture = np.random.default_rng(0).integers(60, 190, (1, SIDE, SIDE, 3), np.uint8)
    signs = np.random.default_rng(1).choice([-20, 20], picture.shape)
    (shifted,), (noisy,) = (image_measures((picture + by).astype(np.uint8), picture) for by in (20, signs))
    assert shifted["psnr"] == pytest.approx(noisy["psnr"])
    assert shifted["ssim"] > noisy["ssim"]


def test_the_worst_is_the_least_near() -> None:
    measures = [{"psnr": 30.0, "off": 0.1}, {"psnr": 40.0, "off": 0.2}]
    assert worst(measures) == {"psnr": 30.0, "off": 0.2}
    assert beyond(worst(measures), {"psnr": 30.0, "off": 0.2}) == ""
    assert beyond(worst(measures), {"psnr": 31.0, "off": 0.1}) == (
        "psnr 30 where at least 31 is allowed, off 0.2 where at most 0.1 is allowed"
    )
    assert np.isnan(worst([{"psnr": np.nan}, {"psnr": 40.0}])["psnr"])
    assert beyond({"psnr": np.nan}, {"psnr": 30.0})


def test_every_precision_that_a_target_offers_has_tolerances() -> None:
    assert TOLERANCES.keys() == set(chain(*PRECISIONS.values()))
    assert TARGETS.keys() == PRECISIONS.keys()
    assert set(QUANTISED) < TOLERANCES.keys()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_precision_of_fewer_bits_may_differ_more(precision: str) -> None:
    finest = TOLERANCES["fp32"]
    for part, tolerance in TOLERANCES[precision].items():
        assert not beyond(finest[part], tolerance)


def gate(folder: Path) -> Gate:
    return Gate("onnx", "fp32", graphs={}, build=lambda graph, folder: fail, refused=folder)


def test_a_refusal_shows_both_and_their_difference_and_goes_when_one_passes(tmp_path: Path) -> None:
    folder = tmp_path / "refused" / "onnx-fp32-1step"
    with pytest.raises(FewstepError, match=f"where at most .* is allowed: nothing was exported, see {folder}$"):
        gate(folder).judge(*check(engine(trajectory=brighter(9))))
    with Image.open(folder / "pictures.png") as picture:
        torch_, found, error = np.split(np.asarray(picture)[::8, ::8], 3, axis=1)
    assert torch_.shape == (SIDE, SIDE, 3)  # a batch of one, each value eight by eight
    np.testing.assert_array_equal(found, np.minimum(torch_.astype(int) + 9, 255))
    assert set(error[found < 255]) == {255}
    gate(folder).judge(*check(engine()))
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_json_whatever_was_measured(tmp_path: Path) -> None:
    def overflow(**tokens: Any) -> Arrays:
        return {"encoder_hidden_states": np.full((len(tokens["input_ids"]), 1, 8), np.inf, np.float32)}

    with pytest.raises(FewstepError, match="its text encoder: largest inf"):
        gate(tmp_path / "refused").judge(*check(engine(overflow)))
    text = (tmp_path / "refused" / "parity.json").read_text(encoding="utf-8")
    report = json.loads(text, parse_constant=pytest.fail)
    assert report["worst"]["text_encoder"] == {"largest": None, "rms": None}
    assert report["failure"]["part"] == "text_encoder"


def test_what_cannot_be_built_is_refused_in_one_line(tmp_path: Path) -> None:
    sentence = "cannot be built or opened: no kernel: nothing was exported"
    with pytest.raises(FewstepError, match=sentence), gate(tmp_path / "refused").building():
        raise RuntimeError("no kernel\nand a page of this")
    assert (tmp_path / "refused" / "parity.json").is_file()
    with pytest.raises(FewstepError, match="not installed"), gate(tmp_path / "other").building():
        raise FewstepError("onnxruntime is not installed")
    assert not (tmp_path / "other").exists()
