"""Generation from noise and text states to pictures on the CPU: diffusers eager and compiled, and with our kernels.

Students have random weights; text encoders are left out. All variants run the same loop in bfloat16, UNets with
channels last. `torch.compile` keeps kernels as operators and fuses what is around them (`fewstep.kernels.operators`).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from students import STUDENTS, Student, random_condition
from timeline import Timeline
from torch import Tensor

from fewstep.kernels.benchmarks.report import Measurement, Report, Row
from fewstep.kernels.patch import apply, remove
from fewstep.runtime.denoiser import Condition, Denoiser
from fewstep.runtime.samplers.consistency import consistency
from fewstep.runtime.schedule import Schedule, uniform_times

Mark = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """How the same networks are run.

    Args:
        kernels: with the layers of `fewstep.kernels.patch`.
        compiled: through `torch.compile`, network and decoder.
        graph: the whole generation replayed as one CUDA graph.
    """

    kernels: bool = False
    compiled: bool = False
    graph: bool = False


VARIANTS = {
    "eager": Variant(),
    "kernels": Variant(kernels=True),
    "eager, graph": Variant(graph=True),
    "kernels, graph": Variant(kernels=True, graph=True),
    "compiled": Variant(compiled=True),
    "compiled, graph": Variant(compiled=True, graph=True),
    "kernels, compiled, graph": Variant(kernels=True, compiled=True, graph=True),
}
"""What is compared; `torch.compile` takes longest and comes last, first as others use it, then with our kernels."""


@dataclass(frozen=True)
class Setting:
    """Where and how long.

    Args:
        device: that generates.
        dtype: of weights and activations.
        backend: of `torch.compile`.
        seconds: spent on repeating each generation, at least thrice.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    backend: str = "inductor"
    seconds: float = 0.4


@dataclass(frozen=True)
class PreparedDenoiser:
    """A denoiser whose network times lie on the device already: a CUDA graph can hold its calls."""

    inner: Denoiser
    times: dict[float, Tensor]
    mark: Mark

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x = x_t * self.schedule.input_scale(t)
        self.mark("sampler")
        output = self.inner.network(x, self.times[float(t)], condition)
        self.mark("denoiser")
        return self.inner.to_sample(output, x_t, t)


class Bench:
    """One student on a device, and every way to run it.

    Args:
        student: as built; it is moved.
        setting: where and how long.
    """

    def __init__(self, student: Student, setting: Setting) -> None:
        self.student, self.setting = student, setting
        self.modules = (student.network, student.decoder)
        for module in self.modules:
            module.to(setting.device, setting.dtype, memory_format=student.layout).eval().requires_grad_(False)
        self.compiled = [torch.compile(module, dynamic=False, backend=setting.backend) for module in self.modules]

    @contextmanager
    def generation(self, variant: Variant, batch: int, steps: int) -> Iterator[Callable[[Mark], Tensor]]:
        """Inside, a function that marks its stages; its pictures (B, H, W, 3) uint8 are on the CPU once it has run."""
        if variant.kernels:
            for module in self.modules:
                apply(module)
        try:
            with torch.inference_mode():
                yield self._generation(variant, batch, steps)
        finally:
            for module in self.modules:
                remove(module)

    def _generation(self, variant: Variant, batch: int, steps: int) -> Callable[[Mark], Tensor]:
        student, device, dtype = self.student, self.setting.device, self.setting.dtype
        network, decoder = self.compiled if variant.compiled else self.modules
        times = tuple(uniform_times(steps))
        denoiser = Denoiser(student.call(network), student.schedule, student.prediction)
        on_device = {t: student.schedule.network_time(torch.tensor(t)).expand(batch).to(device) for t in times[:-1]}
        torch.manual_seed(0)
        condition = random_condition(student, batch, device, dtype)
        noise = torch.randn(steps, batch, *student.sample_shape, device=device, dtype=dtype)
        host: list[Tensor] = []

        def generate(mark: Mark) -> Tensor:
            mark("start")
            prepared = PreparedDenoiser(denoiser, on_device, mark)
            x_0 = consistency(prepared, noise[0], times, condition, noise.__getitem__)
            mark("sampler")
            images = decoder(x_0)
            mark("decoder")
            pixels = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            mark("conversion")
            if not host:
                host.append(torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=device.type == "cuda"))
            host[0].copy_(pixels, non_blocking=True)
            mark("copy to host")
            return host[0]

        return generate

    def ready(self, generate: Callable[[Mark], Tensor], variant: Variant, mark: Mark) -> Callable[[], Any]:
        """Warm up, and capture if the variant is a graph; a generation whose device has finished."""
        for _ in range(2):
            generate(ignore)
        self._wait()
        run: Callable[[], Any] = partial(generate, mark)
        if variant.graph and self.setting.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                generate(mark)
            run = graph.replay

        def generation() -> None:
            run()
            self._wait()

        return generation

    def _wait(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)

    def total(self, variant: Variant, batch: int, steps: int) -> Row:
        """Milliseconds of a generation, pictures a second, and peak memory."""
        if self.setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self.generation(variant, batch, steps) as generate:
            milliseconds = statistics.median(self._laps(self.ready(generate, variant, ignore)))
        row: Row = {"milliseconds": round(milliseconds, 3), "images_per_second": round(1000 * batch / milliseconds, 1)}
        if self.setting.device.type == "cuda":
            row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        return row

    def breakdown(self, variant: Variant, batch: int, steps: int) -> Row:
        """Milliseconds of each stage, and the share of the whole that they account for."""
        graph = variant.graph and self.setting.device.type == "cuda"
        timeline, stages, shares = Timeline(self.setting.device, captured=graph), [], []
        with self.generation(variant, batch, steps) as generate:
            generation = self.ready(generate, variant, timeline.mark)
            for _ in range(5):
                if not graph:
                    timeline.marks.clear()
                (whole,) = self._laps(generation, most=1)
                stages.append(timeline.milliseconds())
                shares.append(sum(stages[-1].values()) / whole)
        medians = {stage: statistics.median(each[stage] for each in stages) for stage in stages[0]}
        rounded = {stage: round(value, 3) for stage, value in medians.items()}
        return {"stages": rounded, "accounted": round(statistics.median(shares), 3)}

    def _laps(self, generation: Callable[[], Any], most: int = 100) -> list[float]:
        """Milliseconds of repeated generations."""
        laps: list[float] = []
        end = time.perf_counter() + self.setting.seconds
        while len(laps) < most and (len(laps) < 3 or time.perf_counter() < end):
            start = time.perf_counter()
            generation()
            laps.append(1000 * (time.perf_counter() - start))
        return laps


def ignore(stage: str) -> None:
    """Marks nothing."""


def measurements(
    students: Mapping[str, Callable[[], Student]],
    setting: Setting,
    batches: Sequence[int] = (1, 4),
    steps: Sequence[int] = (1, 4),
) -> Iterator[Measurement]:
    """One image of every student first; each student is built when its turn comes, and kept."""

    @cache
    def opened(name: str) -> Bench:
        with setting.device:
            return Bench(students[name](), setting)

    for batch, name in product(batches, students):
        torch.compiler.reset()  # else it gives up after a few shapes
        for label, count in product(VARIANTS, steps):
            facts = {"student": name, "batch": batch, "steps": count, "variant": label}
            yield ", ".join(f"{key} {value}" for key, value in facts.items()), partial(_rows, opened, facts)


def _rows(opened: Callable[[str], Bench], facts: Row) -> Iterator[Row]:
    bench, variant = opened(facts["student"]), VARIANTS[facts["variant"]]
    yield {**facts, **bench.total(variant, facts["batch"], facts["steps"])}
    yield {**facts, **bench.breakdown(variant, facts["batch"], facts["steps"])}


def prepare(name: str, variant: str, setting: Setting) -> None:
    """Leave a student's network and decoder, compiled as in a variant, in `torch.compile`'s cache on disk."""
    with setting.device:
        bench = Bench(STUDENTS[name](), replace(setting, seconds=0.0))
    for batch in (1, 4):
        bench.total(replace(VARIANTS[variant], graph=False), batch, 1)


def main(arguments: Sequence[str]) -> None:
    """Measure on the GPU into a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="receives the numbers")
    parser.add_argument("--seconds", type=float, default=300, help="no generation is begun later than this")
    parser.add_argument("--prepare", nargs=2, metavar=("STUDENT", "VARIANT"), help="only fill torch.compile's cache")
    given = parser.parse_args(arguments)
    setting = Setting(torch.device("cuda"))
    if given.prepare:
        prepare(*given.prepare, setting)
    else:
        Report(given.out, given.seconds).measure(measurements(STUDENTS, setting))


if __name__ == "__main__":
    main(sys.argv[1:])
