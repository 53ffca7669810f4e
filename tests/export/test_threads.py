"""The number of threads: the user's where there is one, else what `auto` measures, for every engine alike."""

import os
from pathlib import Path

import pytest
import torch

from fewstep.runtime.engines.device import physical_cores, usable_processors
from fewstep.runtime.engines.onnx import OnnxEngine
from fewstep.runtime.engines.threads import VARIABLES, set_threads, thread_counts, try_threads

from .sampling_network import network

pytestmark = pytest.mark.usefixtures("nobody_said")
PROCESSORS, GRANTED = usable_processors()


def test_what_is_worth_measuring_begins_with_all_processors_and_ends_with_one() -> None:
    counts = thread_counts()
    assert (counts[0], counts[-1]) == (GRANTED, 1)
    assert list(counts) == sorted(set(counts), reverse=True)
    assert set(counts) <= {GRANTED, physical_cores(), 1}
    for count in counts:  # what was tried is nobody's wish
        try_threads(count)
        assert torch.get_num_threads() == count
        assert thread_counts() == counts


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_of_the_user_wins(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    torch.set_num_threads(1)  # as torch does when it is imported
    assert thread_counts() == (1,)


def test_a_number_that_was_given_wins() -> None:
    set_threads(PROCESSORS)
    assert thread_counts() == (PROCESSORS,)


def test_a_number_that_torch_would_not_choose_is_the_users() -> None:
    torch.set_num_threads(PROCESSORS + 3)
    assert thread_counts() == (PROCESSORS + 3,)


def test_a_session_takes_the_number_that_holds_when_it_is_opened(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    onnx.save(network(1), tmp_path / "graph.onnx")
    for count in (2, 1):
        torch.set_num_threads(count)
        assert OnnxEngine(tmp_path / "graph.onnx").session.get_session_options().intra_op_num_threads == count


def test_cores_are_counted_where_linux_tells_them() -> None:
    usable = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    entry = f"processor\t: {usable}\nphysical id\t: {{}}\ncore id\t\t: {{}}\n"
    places = [(0, 0), (0, 0), (0, 1), (1, 1)]
    assert physical_cores("\n".join(entry.format(*place) for place in places)) == 3
    assert physical_cores("processor\t: 0\nBogoMIPS\t: 50.00\n") == PROCESSORS  # as ARM has it
