"""A generation as one module: its bytes, and what it asks of the host while a GPU works."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.runtime.engines.torch import TorchEngine
from fewstep.runtime.families import load_model
from fewstep.runtime.samplers import SAMPLERS, get_sampler
from fewstep.runtime.schedule import uniform_times
from fewstep.runtime.trajectory import Pixels, Trajectory


class Given(nn.Module):
    """A trajectory that draws what it is given."""

    def forward(self, noise: Tensor) -> Tensor:
        return noise


def test_pixels_are_rounded_half_up_and_ordered_for_pictures() -> None:
    bytes_ = torch.arange(256, dtype=torch.float64)
    for shift, expected in ((-0.5, bytes_), (-0.499, bytes_), (0.0, bytes_), (0.499, bytes_)):
        images = ((bytes_ + shift) / 255).clamp(0, 1).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
        pixels = Pixels(Given())(images)  # type: ignore[arg-type]
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (2, 16, 16, 3)
        assert pixels.is_contiguous()
        np.testing.assert_array_equal(pixels[1, ..., 2].flatten(), expected)
    coloured = torch.zeros(1, 3, 2, 2)
    coloured[0, 1, 0, 1] = 1  # green, first row, second column
    assert Pixels(Given())(coloured)[0, 0, 1].tolist() == [0, 255, 0]  # type: ignore[arg-type]


class Transfers(TorchDispatchMode):
    """Counts tensors that are copied from the host to a device while it works, each of which waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        result = operator(*arguments, **(named or {}))
        moved = isinstance(result, Tensor) and result.device.type == "meta"
        if moved and "copy" in operator.name() and any(_on_host(value) for value in arguments):
            self.found.append(operator.name())
        return result


def test_a_copy_to_the_device_is_found() -> None:
    with Transfers() as transfers:
        torch.ones((), device="meta") * torch.tensor(2.0)  # as a number
        torch.tensor(2.0).to("meta")
    assert len(transfers.found) == 1


def _on_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_generation_copies_nothing_to_the_device_and_waits_for_nothing(teacher: Path, sampler: str) -> None:
    """A device without memory stands for the GPU: whoever reads a value from it, or copies one to it, is found out."""
    model = load_model(teacher, torch.device("cpu"))
    model.network.to("meta")
    model.decoder.to("meta")
    condition = {
        "encoder_hidden_states": torch.empty(2, 24, 384, device="meta"),
        "encoder_attention_mask": torch.empty(2, 24, dtype=torch.int64, device="meta"),
    }
    negative = {name: value[:1] for name, value in condition.items()}
    for guidance in (1.0, 3.0):
        trajectory = Trajectory(model, get_sampler(sampler), uniform_times(3), guidance, negative)
        noise = torch.empty(2, trajectory.draws, *model.sample_shape, device="meta")
        with Transfers() as transfers, torch.inference_mode():
            assert Pixels(trajectory)(noise, **condition).shape == (2, 8, 8, 3)
        assert transfers.found == []


@pytest.mark.gpu
@pytest.mark.usefixtures("text")
def test_a_captured_generation_draws_the_same_to_the_bit(four_step_student: Path) -> None:
    images = {}
    for kind, graphs in (("cpu", False), ("cuda", False), ("cuda", True)):
        device = torch.device(kind)
        model = load_model(four_step_student, device)
        trajectory = Trajectory(model, get_sampler("consistency"), uniform_times(4))
        engine = TorchEngine(Pixels(trajectory), device, cuda_graphs=graphs)
        images[kind, graphs] = [engine(**_inputs(batch, seed))["pixels"] for seed, batch in enumerate((1, 3, 1, 8, 3))]
    for captured, eager, on_cpu in zip(images["cuda", True], images["cuda", False], images["cpu", False], strict=True):
        np.testing.assert_array_equal(captured, eager)
        assert np.abs(captured.astype(int) - on_cpu).max() <= 2  # float32 sums in another order, over four steps
    assert (images["cuda", True][0] != images["cuda", True][2]).any()  # what was replayed is not what was captured


@pytest.mark.gpu
@pytest.mark.usefixtures("text")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_compiled_generation_draws_the_same(four_step_student: Path, graphs: bool) -> None:
    images = []
    for kind in ("cpu", "cuda"):
        model = load_model(four_step_student, torch.device(kind))
        trajectory = Trajectory(model, get_sampler("consistency"), uniform_times(4))
        engine = TorchEngine(Pixels(trajectory), torch.device(kind), cuda_graphs=graphs, compiled=True)
        images.append([engine(**_inputs(batch, seed))["pixels"] for seed, batch in enumerate((1, 3, 1))])
    torch.compiler.reset()
    for on_cpu, compiled in zip(*images, strict=True):
        assert np.abs(compiled.astype(int) - on_cpu).max() <= 2  # float32 sums in another order, over four steps


def _inputs(batch: int, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "noise": generator.standard_normal((batch, 4, 4, 4, 4), dtype=np.float32),
        "encoder_hidden_states": generator.standard_normal((batch, 24, 384), dtype=np.float32),
        "encoder_attention_mask": np.ones((batch, 24), np.int64),
    }
