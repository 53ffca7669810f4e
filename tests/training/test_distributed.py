"""Several processes, and processes that are killed: the weights are those of one process that runs through."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.runtime.errors import FewstepError
from fewstep.training.distribution import make_accelerator
from fewstep.training.trainer_config import TrainerConfig

HERE = Path(__file__).parent
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
MULTI_GPU = ["--multi_gpu"]
"""Without MPI accelerate starts several processes only under this; the trainer keeps them on the CPU."""
ZERO = {stage: ["--use_deepspeed", "--zero_stage", str(stage)] for stage in (1, 2, 3)}
needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(HERE), "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **settings}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def launch(
    folder: Path, processes: int = 2, kind: Sequence[str] = MULTI_GPU, **options: Any
) -> subprocess.CompletedProcess[str]:
    launcher = [*LAUNCH, *kind] if processes == 2 else []
    return run(*launcher, str(HERE / "launched.py"), str(folder), json.dumps(options))


def read(folder: Path, name: str = "state.pt") -> Any:
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that accumulates two micro-batches; `half` is where it stood after half of its steps."""
    folder = tmp_path_factory.mktemp("one")
    for iterations in (4, 8):
        result = launch(folder, processes=1, accumulation=2, iterations=iterations)
        assert result.returncode == 0, result.stderr
        if iterations == 4:
            shutil.copytree(folder, folder / "half")
    return folder


def assert_same_run(folder: Path, other: Path, tolerance: float) -> None:
    """Weights, moments (and so gradients), averages and curves."""
    first, second = read(folder), read(other)
    for name in ("turns", "ema", "averages"):
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)
    curves = zip(first["progress"]["curve"], second["progress"]["curve"], strict=True)
    assert all(point | {"seconds": 0} == pytest.approx(same | {"seconds": 0}, abs=1e-6) for point, same in curves)
    for student in ("student-main.pt", "student-other.pt"):
        torch.testing.assert_close(
            read(other, student), read(folder, "student-main.pt"), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_go_on_as_one_that_accumulates(one: Path, sharded: bool, tmp_path: Path) -> None:
    """Noise, dropout, data, logged means: all follow the shard, whichever process has it."""
    folder = shutil.copytree(one / "half", tmp_path / "two")
    assert read(folder)["progress"]["step"] == 4
    result = launch(folder, sharded=sharded)
    assert result.returncode == 0, result.stderr
    assert_same_run(one, folder, 1e-6 if sharded else 1e-7)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_goes_on_as_one_process_that_accumulates(stage: int, tmp_path: Path) -> None:
    """Without weight decay, which ZeRO applies to parameters that no loss uses, too; they also get moments, of zero."""
    folder, options = tmp_path / "one", {"weight_decay": 0.0, "accumulation": 4}
    folder.mkdir()
    assert launch(folder, processes=1, iterations=4, **options).returncode == 0
    shutil.copytree(folder, tmp_path / "two")
    assert launch(folder, processes=1, **options).returncode == 0
    result = launch(tmp_path / "two", kind=ZERO[stage], **options | {"accumulation": 2})
    assert result.returncode == 0, result.stderr
    state = read(tmp_path / "two")
    for turn, expected in zip(state["turns"], read(folder)["turns"], strict=True):
        moments = turn["optimizer"]["state"]
        assert not any(
            moments.pop(index)["exp_avg_sq"].any() for index in moments.keys() - expected["optimizer"]["state"]
        )
    torch.save(state, tmp_path / "two" / "state.pt")
    assert_same_run(folder, tmp_path / "two", 1e-6)


@needs_deepspeed
def test_zero_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    for name, stops in (("whole", [8]), ("parts", [5, 8])):
        (tmp_path / name).mkdir()
        for iterations in stops:
            result = launch(tmp_path / name, kind=ZERO[2], precision="bf16", iterations=iterations)
            assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 0)


@needs_deepspeed
def test_what_zero_cannot_do_here_is_refused(tmp_path: Path) -> None:
    result = launch(tmp_path, kind=ZERO[3])
    assert "DeepSpeed is supported with --zero_stage 1 or 2, without offloading" in result.stderr


def test_two_processes_end_together_by_the_main_ones_clock(tmp_path: Path) -> None:
    result = launch(tmp_path, iterations=1_000_000, minutes=0.02, log_every=5)
    assert result.returncode == 0, result.stderr
    progress = read(tmp_path)["progress"]
    assert progress["step"] % 5 == 0
    assert progress["step"] < 1_000_000
    assert progress["seconds"] >= 1.2
    torch.testing.assert_close(read(tmp_path, "student-main.pt"), read(tmp_path, "student-other.pt"), rtol=0, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_only_a_command_that_succeeds_ends_its_process_at_once(fails: bool, tmp_path: Path) -> None:
    """At once, for gloo's threads abort an interpreter that ends; not after a failure, whose reason must be told."""
    begun = "torch.distributed.init_process_group('gloo', f'file://{sys.argv.pop()}', world_size=1, rank=0)"
    command = f"import sys, torch; {begun}; from fewstep.app.cli import main; import fewstep.training.train_teacher"
    train = "fewstep.training.train_teacher.train_teacher = lambda *_: " + ("open('/none')" if fails else "print('ok')")
    arguments = ("train", "teacher", "--data", ".", "--autoencoder", ".", "--out", ".", str(tmp_path / "store"))
    result = run("-c", f"{command}; import atexit; atexit.register(print, 'ended'); {train}; main()", *arguments)
    assert (result.returncode, result.stdout) == ((2, "ended\n") if fails else (0, "ok\n"))
    assert ("cannot read or write /none" in result.stderr) == fails


def test_a_process_that_cannot_see_the_checkpoint_says_so(one: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(one / "half", tmp_path / "two")
    before = (folder / "state.pt").read_bytes()
    result = launch(folder, apart=True)
    assert result.returncode != 0
    assert "a process cannot see" in result.stderr
    assert "give an --out on a disk that all processes share" in result.stderr
    assert (folder / "state.pt").read_bytes() == before


def test_another_number_of_shards_is_a_changed_recipe(one: Path) -> None:
    before = (one / "state.pt").read_bytes()
    result = launch(one, processes=1, accumulation=3, iterations=20)
    assert result.returncode == 2
    assert "begun with processes x accumulation = 2, and is now given 3" in result.stderr
    assert (one / "state.pt").read_bytes() == before


def test_killed_at_any_moment_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    result = run(str(HERE / "killed.py"), str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 3
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    for name in ("turns", "ema", "averages"):
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=0)
    assert not list((tmp_path / "parts").glob(".*.part"))


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        pytest.param(
            *(
                "ACCELERATE_USE_DEEPSPEED",
                "DeepSpeed is not installed: pip install deepspeed, or launch with --use_fsdp",
            ),
            marks=pytest.mark.skipif(bool(find_spec("deepspeed")), reason="DeepSpeed is installed"),
        ),
        ("ACCELERATE_USE_FSDP", "FSDP needs two or more GPUs: launch without --use_fsdp"),
    ],
)
def test_unsupported_configurations_are_refused(variable: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(FewstepError, match=message):
        make_accelerator(nn.Linear(2, 2), TrainerConfig())
