"""The kernels' benchmark, on shapes that a CPU gets through, and what is made of its numbers."""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.kernels.benchmarks.__main__ import measure_all
from fewstep.kernels.benchmarks.cases import OPERATIONS, all_cases
from fewstep.kernels.benchmarks.measure import Case, Settings, Variant, compare
from fewstep.kernels.benchmarks.report import Report
from fewstep.kernels.benchmarks.shapes import FULL, Level, Shapes, Transformer, UNet
from fewstep.kernels.benchmarks.timing import copy_of, matrix_rates, median_seconds

TINY = Shapes(
    transformers={
        "Sana": Transformer(32, 2, 16, 2, {32: 4, 64: 16}),
        "Flux": Transformer(32, 2, 16, 2, {32: 4}, text=3),
    },
    unets={"SDXL": UNet(32, 2, (Level(32, 4), Level(64, 2, 2)))},
    decoder=(Level(32, 8),),
)
CEILINGS = {"bf16": 2.0, "int8": 4.0, "fp8": 4.0}


@pytest.fixture
def settings(device: str) -> Settings:
    return Settings(torch.device(device), torch.float32, repeats=1, backend="eager")


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * x


FIRST = {case.operation: case for case in reversed(list(all_cases(TINY)))}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch itself calls for tangents
@pytest.mark.parametrize("operation", sorted(FIRST))
def test_every_operation_is_measured(operation: str, settings: Settings) -> None:
    case = FIRST[operation]
    rows = list(compare(case, settings, CEILINGS))
    assert [row["pass"] for row in rows] == (["forward", "backward"] if case.trained else ["forward"])
    for row in rows:
        assert row["microseconds"].keys() >= {"eager", "kernel", "compiled"}
        assert ("teraflops" in row) != ("gigabytes_per_second" in row)
        assert row["largest_difference"]["compiled"] < 1e-3
        # On a CPU the kernel is the reference; on a GPU its products may be TF32.
        assert row["largest_difference"]["kernel"] <= (0 if settings.device.type == "cpu" else 1e-2)


def test_all_operations_are_listed_and_named_where_there_is_no_time(settings: Settings) -> None:
    assert len(FIRST) == len(OPERATIONS) + 1  # the gated residual, with its norm and without
    report = Report(None, -1)
    measure_all(report, settings, TINY, side=64)
    ceilings = report.content["ceilings"]["matrix_teraflops"]
    assert report.content["left_out"] == [
        case.name for case in all_cases(TINY) if not case.work or case.ceiling in ceilings
    ]


def test_bytes_are_those_of_arguments_and_results(settings: Settings) -> None:
    case = Case("scaled", "none", "8", scaled, scaled, lambda settings: (settings.random(8), 2.0), trained=(0,))
    for row in compare(case, settings, CEILINGS):
        traffic = 4 * 8 * {"forward": 2, "backward": 3}[row["pass"]]
        for variant, rate in row["gigabytes_per_second"].items():
            assert rate == pytest.approx(traffic / row["microseconds"][variant] / 1e3, rel=0.05, abs=0.1)
        times = row["microseconds"]
        assert row["fraction_of_ceiling"] == pytest.approx(times["copy"] / times["kernel"], rel=0.05, abs=0.01)


def test_work_is_measured_against_the_matrix_rate_of_its_format(settings: Settings) -> None:
    def third(x: torch.Tensor, factor: float) -> Variant:
        return Variant(scaled, (x, factor), share=1 / 3)

    case = Case(
        "work", "none", "8", scaled, scaled, lambda settings: (settings.random(8), 2.0), work=6e9, ceiling="int8"
    )
    (row,) = compare(case, settings, CEILINGS)
    seconds = row["microseconds"]["kernel"] / 1e6
    assert row["teraflops"]["kernel"] == pytest.approx(6e-3 / seconds, rel=0.05)
    assert row["fraction_of_ceiling"] == pytest.approx(6e-3 / 4.0 / seconds, rel=0.05, abs=1e-3)
    (row,) = compare(Case(**{**vars(case), "rivals": {"third": third}}), settings, CEILINGS)
    assert row["teraflops"]["third"] == pytest.approx(2e3 / row["microseconds"]["third"], rel=0.05)


def test_a_wrong_kernel_is_seen(settings: Settings) -> None:
    def wrong(x: torch.Tensor, factor: float) -> torch.Tensor:
        return 1.5 * factor * x

    case = Case("wrong", "none", "8", wrong, scaled, lambda settings: (settings.random(8), 2.0), trained=(0,))
    assert [row["largest_difference"]["kernel"] for row in compare(case, settings, CEILINGS)] == [0.5, 0.5]


def variant_of(function: Callable[..., torch.Tensor], *inputs: Any) -> Variant:
    return Variant(function, inputs, trained=(0,))


def test_a_rival_that_fails_leaves_the_others(settings: Settings) -> None:
    def failing(x: torch.Tensor, factor: float) -> torch.Tensor:
        raise RuntimeError("not this shape")

    rivals = {"failing": partial(variant_of, failing), "double": partial(variant_of, scaled)}
    case = Case("rivals", "none", "8", scaled, scaled, lambda settings: (settings.random(8), 2.0), (0,), rivals)
    for row in compare(case, settings, CEILINGS):
        assert row["microseconds"].keys() == {"eager", "kernel", "compiled", "double", "copy"}


def test_full_size_cases_fit_together_without_any_memory() -> None:
    settings = Settings(torch.device("meta"))
    for case in all_cases():
        if case.operation != "quantised_linear":  # which looks at its weight
            inputs = case.inputs(settings)
            assert case.reference(*inputs) is not None
            assert all(inputs[position].is_floating_point() for position in case.trained)


def test_no_operation_is_left_for_last() -> None:
    first = list(islice(all_cases(), 2 * len(OPERATIONS)))  # residuals come in two kinds
    assert {case.operation for case in first} == FIRST.keys()
    assert {case.model for case in all_cases()} == FULL.transformers.keys() | FULL.unets.keys()
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))


def test_matrix_rates_are_of_all_formats(device: str) -> None:
    rates = matrix_rates(torch.device(device), 64)
    assert {"bf16", "int8"} <= rates.keys()


def test_a_copy_reads_and_writes_the_bytes_together(device: str) -> None:
    copied = copy_of(64, torch.device(device))()
    assert isinstance(copied, torch.Tensor)
    assert copied.nbytes == 32


def test_the_median_forgives_a_slow_call() -> None:
    durations = iter([0.0] * 5 + [0.2] + [0.0] * 20)
    assert median_seconds(lambda: time.sleep(next(durations)), torch.device("cpu"), repeats=9) < 0.1


def test_a_report_is_written_row_by_row_and_names_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "device" / "report.json"
    written: list[Any] = []

    def good() -> Iterator[dict[str, int]]:
        yield {"row": 1}
        written.append(json.loads(file.read_text()))
        yield {"row": 2}

    def bad() -> Iterator[dict[str, int]]:
        raise RuntimeError("no such kernel")

    report = Report(file, 60, {"fact": 3})
    report.measure([("bad", bad), ("good", good)])
    assert written == [
        {"fact": 3, "rows": [{"row": 1}], "left_out": [], "failed": {"bad": "RuntimeError: no such kernel"}}
    ]
    assert json.loads(file.read_text())["rows"] == [{"row": 1}, {"row": 2}]
    assert [path.name for path in file.parent.iterdir()] == ["report.json"]
    late = Report(None, -1)
    late.measure([("good", good)])
    assert late.content == {"rows": [], "left_out": ["good"], "failed": {}}
