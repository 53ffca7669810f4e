"""Pairs of noise and teacher sample, made once and cached: reflow, distillation and warm-ups regress on them.

What is kept is the teacher's trajectory at a few times, the two ends at least. A chunk of pairs is one batch and one
file; its condition is that of the batch of the same number, asked for again when it is needed.
Shapes: path (K + 1, B, ...) from `x_T` to `x_0`, times (K + 1).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.denoiser import Condition, DenoiserLike, initial_scale
from ..runtime.errors import FewstepError
from ..runtime.files import atomic_path
from ..runtime.samplers import SAMPLERS, get_sampler
from .batches import ConditionedBatch
from .checks import at_least
from .method import Task
from .numerics import all_finite
from .phase import Draws
from .straight_path import straight_point

CONDITION_PHASE = 15
"""Of the batches whose conditions pairs are made with: none of the trainer's own."""

CHUNK_SEED = 0x9A125
"""Sets the draw of a chunk apart from all others of a step."""

SAME_ORIGIN = 1e-2
"""Relative difference of answers up to which two denoisers are the same but for the hardware's rounding.

GPUs that multiply in TF32 round every factor to 10 bits, by up to 5e-4 of it, which adds up over a network's layers.
"""


@dataclass(frozen=True)
class PairsConfig:
    """How pairs are made.

    Args:
        count: of pairs, rounded up to whole batches (rf++: 1 million for CIFAR-10).
        sampler: of the teacher, one that draws no noise (rf++: `heun`).
        solver_steps: of that sampler from noise to sample (rf++: 18).
    """

    count: int = 8192
    sampler: str = "dpm++2m"
    solver_steps: int = 16

    def __post_init__(self) -> None:
        at_least(1, count=self.count, solver_steps=self.solver_steps)


@dataclass(frozen=True)
class PairBatch:
    """Trajectories `path` (K + 1, B, ...) from `x_T` to `x_0`, and their condition."""

    path: Tensor
    condition: Condition


@dataclass(frozen=True)
class Pairs:
    """Cached pairs.

    Args:
        folder: holds one file a chunk.
        chunks: how many.
        times: of the points of each trajectory, from 1 down to 0.
        batches: give the conditions.
        device: where batches go.
    """

    folder: Path
    chunks: int
    times: tuple[float, ...]
    batches: Callable[[int, int], ConditionedBatch]
    device: torch.device

    def chunk(self, number: int) -> PairBatch:
        """One chunk, `number` in [0, chunks)."""
        path = load_file(_file(self.folder, number))["path"]
        return PairBatch(path.to(self.device), self.batches(number, CONDITION_PHASE).condition)

    def draw(self, draws: Draws) -> PairBatch:
        """A chunk at random, its own for each process."""
        # Drawn on the CPU, so as not to wait for a GPU; and not with the very seed of the noise and the times.
        generator = torch.Generator().manual_seed(draws.own.initial_seed() ^ CHUNK_SEED)
        return self.chunk(int(torch.randint(self.chunks, (), generator=generator)))


@torch.no_grad()
def make_pairs(
    task: Task, denoiser: DenoiserLike, name: str, config: PairsConfig, times: Sequence[float] = (1.0, 0.0)
) -> Pairs:
    """Solve `denoiser`'s probability flow from fresh noise, under the task's conditions; what is cached is not redone.

    Processes that make the same pairs at once share the work through the files.

    Args:
        task: gives the conditions, the shape, and the folder of the cache.
        denoiser: the guided teacher, or the student of an earlier stage.
        name: of the pairs; each name has its own noise.
        config: how many, and how they are solved.
        times: at which trajectories are kept, from 1 down to 0.

    Raises:
        FewstepError: the sampler is unknown or draws noise, the cache was made by another teacher, or the teacher's
            samples are not finite.
    """
    if get_sampler(config.sampler).stochastic:
        names = ", ".join(name for name, sampler in SAMPLERS.items() if not sampler.stochastic)
        raise FewstepError(f"pairs need a sampler that draws no noise, not {config.sampler}: choose from {names}")
    shape = tuple(task.batches(0, CONDITION_PHASE).x_0.shape)
    determined = [name, config.sampler, config.solver_steps, list(times), shape]  # not the count: a larger one goes on
    key = hashlib.sha256(json.dumps(determined).encode()).hexdigest()[:16]
    chunks = -(-config.count // shape[0])
    pairs = Pairs(task.folder / "pairs" / f"{name}-{key}", chunks, tuple(times), task.batches, task.device)
    _check_origin(pairs, denoiser, key, shape)
    missing = [number for number in _shared_order(chunks) if not _file(pairs.folder, number).exists()]
    for number in track(missing, f"making pairs ({name})", disable=not missing):
        file = _file(pairs.folder, number)
        if not file.exists():  # another process may have made it by now
            path = _solve(denoiser, _initial(denoiser, key, number, shape, task.device), pairs, number, config)
            _require_finite(path, config)
            with atomic_path(file) as temporary:
                save_file({"path": path.cpu()}, temporary)
    return pairs


def _require_finite(path: Tensor, config: PairsConfig) -> None:
    if not all_finite(path):
        raise FewstepError(
            f"the teacher gave NaN or infinity for a pair ({config.solver_steps} steps of {config.sampler}): check it "
            "with fewstep generate, or give pairs.sampler or pairs.solver_steps another value"
        )


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def _shared_order(chunks: int) -> list[int]:
    """All chunks, each of several processes beginning elsewhere."""
    first = chunks * int(os.environ.get("RANK", "0")) // int(os.environ.get("WORLD_SIZE", "1"))
    return [number % chunks for number in range(first, first + chunks)]


def _initial(denoiser: DenoiserLike, key: str, number: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`x_T` of a chunk, drawn on the CPU so that no device changes it."""
    seed = int(hashlib.sha256(f"{key} {number}".encode()).hexdigest()[:15], 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return initial_scale(denoiser.schedule, 1.0) * noise.to(device)


def _solve(denoiser: DenoiserLike, x_T: Tensor, pairs: Pairs, number: int, config: PairsConfig) -> Tensor:
    """One chunk's trajectories (K + 1, B, ...); each segment takes its share of the solver's steps, rounded up."""

    def no_noise(_: int) -> Tensor:
        raise AssertionError("a deterministic sampler asked for noise")

    condition = pairs.batches(number, CONDITION_PHASE).condition
    steps = -(-config.solver_steps // (len(pairs.times) - 1))
    path = [x_T]
    for here, there in pairwise(pairs.times):
        inner = [here + (there - here) * step / steps for step in range(steps)]
        path.append(get_sampler(config.sampler).function(denoiser, path[-1], [*inner, there], condition, no_noise))
    return torch.stack(path)


def _check_origin(pairs: Pairs, denoiser: DenoiserLike, key: str, shape: tuple[int, ...]) -> None:
    """Tell the denoiser that made the cache by its answer halfway to noise, which other hardware hardly changes."""
    x_T = _initial(denoiser, key, 0, shape, pairs.device)
    t = torch.tensor(0.5)
    x_t = straight_point(denoiser.schedule, torch.zeros_like(x_T), x_T, t)
    answer = denoiser(x_t, t, pairs.batches(0, CONDITION_PHASE).condition).float().cpu()
    file = pairs.folder / "origin.safetensors"
    if not file.exists():
        with atomic_path(file) as temporary:
            save_file({"answer": answer}, temporary)
    known = load_file(file)["answer"]
    if (answer - known).norm() > SAME_ORIGIN * known.norm():
        raise FewstepError(f"the pairs in {pairs.folder} are of another teacher: remove them, or give another --out")
