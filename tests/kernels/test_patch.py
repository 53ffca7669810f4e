"""Fused operations in tiny networks of every supported family: same results, same weights, and out again."""

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import kernels
from fewstep.kernels import dispatch

from .networks import (
    Arguments,
    Family,
    autoencoder,
    build,
    flux,
    pixart,
    run,
    sana,
    sana_autoencoder,
    sana_sprint,
    scale_shift_unet,
    sdxl_unet,
    stable_diffusion_3,
    unet,
)

# Of the largest entry, in float32. The references sum as diffusers does, but for RMSNorm (measured: 4e-7); kernels sum
# in another order, and gradients through Sana's linear attention cancel: there plain torch is 1e-4 off float64, and
# kernels 2e-4.
TOLERANCE = 1e-5
KERNEL_TOLERANCE = 5e-4


COUNTS = {
    unet: {"adaptive_norm": 4, "gated_linear_unit": 4, "gated_residual_norm": 8, "group_norm_silu": 21},
    sdxl_unet: {"adaptive_norm": 8, "gated_linear_unit": 8, "gated_residual_norm": 16, "group_norm_silu": 21},
    scale_shift_unet: {"group_norm_silu": 22},
    autoencoder: {"group_norm_silu": 24},
    stable_diffusion_3: {
        "adaptive_norm": 6,
        "gated_residual": 4,
        "gated_residual_norm": 3,
        "norm_rotary": 5,
        "timestep_embedding": 1,
    },
    flux: {
        "adaptive_norm": 4,
        "gated_residual": 3,
        "gated_residual_norm": 2,
        "norm_rotary": 3,
        "timestep_embedding": 2,
    },
    sana: {
        "adaptive_norm": 3,
        "gated_linear_unit": 1,
        "gated_residual": 2,
        "gated_residual_norm": 1,
        "timestep_embedding": 1,
    },
    sana_sprint: {
        "adaptive_norm": 7,
        "gated_linear_unit": 1,
        "gated_residual": 2,
        "gated_residual_norm": 1,
        "timestep_embedding": 2,
    },
    sana_autoencoder: {"adaptive_norm": 7, "gated_linear_unit": 2},
    pixart: {"adaptive_norm": 1, "gated_residual": 2, "gated_residual_norm": 1, "timestep_embedding": 3},
}
pytestmark = pytest.mark.usefixtures("slow_convolutions")
every_family = pytest.mark.parametrize("family", COUNTS, ids=lambda family: family.__name__)


def derivatives(network: nn.Module, arguments: Arguments) -> dict[str, Tensor | None]:
    """Output, and the gradient of every parameter for one random gradient of the output."""
    network.zero_grad()
    output = run(network, arguments)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
    return {"output": output.detach()} | {name: value.grad for name, value in network.named_parameters()}


def assert_close(found: Tensor | None, expected: Tensor | None, tolerance: float = TOLERANCE) -> None:
    if found is None or expected is None:
        assert found is expected
    else:
        # No less than 1e-3: the gradient of a key's bias is 0 but for rounding.
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(float(expected.abs().max()), 1e-3))


@pytest.fixture
def fused() -> Iterator[None]:
    """Fused forwards run on the CPU too: through the references."""
    with dispatch.fused_everywhere():
        yield


@every_family
def test_fused_network_computes_the_same_and_has_the_same_gradients(family: Family, fused: None) -> None:
    network, arguments = build(family)
    with torch.no_grad():
        plain = run(network, arguments)
    expected = derivatives(network, arguments)
    kernels.apply(network)
    with torch.no_grad():  # the embedding of the time is fused without gradients only
        assert_close(run(network, arguments), plain)
    found = derivatives(network, arguments)
    assert found.keys() == expected.keys()
    for name in found:
        assert_close(found[name], expected[name])


@every_family
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch's own RMSNorm under autocast
def test_fused_network_is_as_exact_in_half_precision(family: Family, autocast: bool, fused: None) -> None:
    network, arguments = build(family)
    with torch.no_grad():
        exact = run(network, arguments)
        if not autocast:
            network.bfloat16()
            arguments = halved(arguments)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = run(network, arguments)
            kernels.apply(network)
            found = run(network, arguments)
    assert found.dtype == plain.dtype
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()


def halved(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: halved(item) for name, item in value.items()}
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


@every_family
def test_counts_are_the_calls_of_each_operation(family: Family, fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            calls[name] += 1
            return operation(*values, **options)

        return call

    network, arguments = build(family)
    counts = kernels.apply(network)
    assert counts == COUNTS[family]
    for module in [value for name, value in sys.modules.items() if name.startswith("fewstep.kernels.rules_")]:
        for name in counts.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    with torch.no_grad():
        run(network, arguments)
    assert calls == counts


@every_family
def test_patched_network_on_a_cpu_is_the_plain_one_and_removal_leaves_no_trace(family: Family) -> None:
    network, arguments = build(family)
    classes = classes_of(network)
    tensors = {name: value.data_ptr() for name, value in network.state_dict().items()}
    with torch.no_grad():
        expected = run(network, arguments)
        assert kernels.apply(network) == COUNTS[family]
        patched = classes_of(network)
        assert patched != classes
        assert torch.equal(run(network, arguments), expected)
        assert kernels.apply(network) == COUNTS[family]  # twice is once
        assert classes_of(network) == patched
        kernels.remove(network)
        assert classes_of(network) == classes
        assert torch.equal(run(network, arguments), expected)
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == tensors


def classes_of(network: nn.Module) -> list[type]:
    """Of all layers and attention processors."""
    layers = list(network.modules())
    return [type(layer) for layer in layers] + [type(getattr(layer, "processor", None)) for layer in layers]


@pytest.mark.parametrize("family", [autoencoder, stable_diffusion_3, flux])
def test_copies_and_files_of_a_patched_network(family: Family, fused: None, tmp_path: Path) -> None:
    network, arguments = build(family)
    network.eval()
    with torch.no_grad():
        plain = run(network, arguments)
        network.save_pretrained(tmp_path / "plain")
        kernels.apply(network)
        network.save_pretrained(tmp_path / "patched")
        twin = copy.deepcopy(network)
        assert classes_of(twin) == classes_of(network)
        assert_close(run(twin, arguments), plain)
        kernels.remove(twin)
        assert kernels.apply(twin) == COUNTS[family]
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()
    opened = type(network).from_pretrained(tmp_path / "patched").eval()
    with torch.no_grad():
        torch.testing.assert_close(run(opened, arguments), plain, rtol=0, atol=0)


def test_counts_of_stable_diffusion() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel()
    counts = {"adaptive_norm": 16, "gated_linear_unit": 16, "gated_residual_norm": 32, "group_norm_silu": 61}
    assert kernels.apply(network) == counts


def test_attention_processors_that_networks_share_stay_apart(fused: None) -> None:
    (network, _), (other, _) = build(flux), build(flux)
    shared: Any = next(iter(other.attn_processors.values()))
    shared._attention_backend = "_native_math"
    network.set_attn_processor(shared)
    other.set_attn_processor(shared)
    kernels.apply(network)
    assert {type(processor) for processor in other.attn_processors.values()} == {type(shared)}
    assert type(shared) not in {type(processor) for processor in network.attn_processors.values()}
    assert {processor._attention_backend for processor in network.attn_processors.values()} == {"_native_math"}


def test_only_layers_of_exactly_the_known_classes_are_replaced() -> None:
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D

    class OtherGEGLU(GEGLU):  # type: ignore[misc]
        pass

    block = ResnetBlock2D(in_channels=4, groups=2, temb_channels=None, non_linearity="mish")
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), OtherGEGLU(4, 4), block)
    classes = classes_of(network)
    assert kernels.apply(network) == {}
    assert classes_of(network) == classes


def test_a_layer_by_itself_is_replaced(fused: None) -> None:
    from diffusers.models.activations import SwiGLU

    layer, x = SwiGLU(6, 4), torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = layer(x)
        assert kernels.apply(layer) == {"gated_linear_unit": 1}
        assert_close(layer(x), expected)


def test_adapters_put_in_later_take_part(fused: None) -> None:
    """Low-rank adapters wrap linear layers, the embedding of the time's among them, whose weights are read directly."""
    from peft import LoraConfig

    network, arguments = build(flux)
    kernels.apply(network)
    targets = ["linear_1", "linear_2", "to_q", "add_k_proj", "proj", "linear"]
    network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        found = run(network, arguments)
        kernels.remove(network)
        assert_close(found, run(network, arguments))
        network.disable_adapters()
        assert not torch.allclose(found, run(network, arguments))


@pytest.mark.parametrize("family", [unet, stable_diffusion_3])
def test_dropout_checkpointing_and_chunks_keep_working(family: Family, fused: None) -> None:
    network, arguments = build(family)
    network.train()
    network.enable_gradient_checkpointing()
    if family is stable_diffusion_3:
        network.enable_forward_chunking(1, 1)
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.5
    torch.manual_seed(1)
    expected = derivatives(network, arguments)
    kernels.apply(network)
    torch.manual_seed(1)
    found = derivatives(network, arguments)
    for name in found:
        assert_close(found[name], expected[name])
    assert not torch.equal(derivatives(network, arguments)["output"], found["output"])


@pytest.mark.parametrize("family", [unet, flux, sana])
def test_fused_network_with_the_kernels_themselves(family: Family, interpreted: None, triton_device: str) -> None:
    network, arguments = build(family)
    network.to(triton_device)
    arguments = {name: value.to(triton_device) for name, value in arguments.items()}
    with torch.no_grad():
        plain = run(network, arguments)
    expected = derivatives(network, arguments)
    kernels.apply(network)
    with torch.no_grad():
        assert_close(run(network, arguments), plain, KERNEL_TOLERANCE)
    found = derivatives(network, arguments)
    for name in found:
        assert_close(found[name], expected[name], KERNEL_TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on its first dual tensor
def test_forward_mode_and_float64_get_plain_torch(interpreted: None) -> None:
    x = torch.ones(2)
    seen: list[bool] = []
    torch.func.jvp(lambda value: seen.append(dispatch.runs_fused(value)) or value, (x,), (x,))
    assert seen == [False]
    assert dispatch.runs_fused(x)
    assert not dispatch.runs_fused(x.double())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fewstep.kernels", {"torch", "diffusers", "triton"}),
        (
            "import fewstep.kernels, torch; assert fewstep.kernels.apply(torch.nn.Linear(1, 1)) == {}",
            {"diffusers", "triton"},
        ),
    ],
)
def test_patching_loads_nothing_that_the_network_has_not_loaded(code: str, absent: set[str]) -> None:
    code = f"{code}; import sys; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
