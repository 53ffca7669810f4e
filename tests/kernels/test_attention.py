"""Attention: its kernels against float64, finite differences and torch's own, and how autograd takes it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels.attention import (
    attention,
    attention_reference,
    attention_with_tangent,
    attention_with_tangent_reference,
)

# float32: another order of summation. float16: besides the result, the weights and their tangents (up to a few units)
# are rounded before they are multiplied; gradients round twice. bfloat16 has 3 bits less, and runs on a GPU only: the
# interpreter multiplies it wrongly.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}
Attend = Callable[..., Tensor]
# torch.func.jvp imports a part of torch that warns of another.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest, triton_device: str) -> torch.dtype:
    if request.param == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    chosen: torch.dtype = request.param
    return chosen


def inputs(
    device: str, rows: int, keys: int, head: int, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 2
) -> list[Tensor]:
    """Query, key, value, and as many tangents."""
    sizes = [rows, keys, keys] * 2
    return [torch.randn(batch, heads, size, head, device=device).to(dtype) for size in sizes]


def attend(*tensors: Tensor, causal: bool = False, scale: float | None = None, lengths: Tensor | None = None) -> Tensor:
    """What `attention` is on a GPU, here by the interpreter."""
    from fewstep.kernels.attention_triton import attend

    query, key, value = tensors
    return attend(query, key, value, causal, scale, lengths)


def attend_with_tangent(
    *tensors: Tensor | None, causal: bool = False, scale: float | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from fewstep.kernels.attention_triton import attend_with_tangent

    return attend_with_tangent(*tensors, causal, scale, lengths)


def exact(*tensors: Tensor, **options: bool | Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and tangent by torch.func.jvp in float64."""
    wide = [tensor.double() for tensor in tensors]
    reference = partial(attention_reference, **options)
    out, d_out = torch.func.jvp(reference, tuple(wide[:3]), tuple(wide[3:]))
    return out, d_out


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """To within a fraction of the largest number, and of 1: what is summed is that large, even where the sum is not."""
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=tolerance, atol=tolerance * largest)


def assert_equal_to_float64(tensors: list[Tensor], **options: bool | Tensor | None) -> None:
    """Output, tangent and gradients of the kernels."""
    tolerance = TOLERANCE[tensors[0].dtype]
    expected, d_expected = exact(*tensors, **options)
    out, d_out = attend_with_tangent(*tensors, **options)
    assert out.dtype == d_out.dtype == tensors[0].dtype
    assert_close(out, expected, tolerance)
    assert_close(d_out, d_expected, tolerance)
    direction = torch.randn_like(out)
    found = gradients(partial(attend, **options), tensors[:3], direction)
    wide = [tensor.double() for tensor in tensors[:3]]
    reference = partial(attention_reference, **options)
    for gradient, expected in zip(found, gradients(reference, wide, direction.double()), strict=True):
        assert_close(gradient, expected, tolerance)


def gradients(function: Attend, tensors: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, direction)


@pytest.mark.parametrize("head", [8, 32, 64, 72, 96, 128])
def test_kernels_equal_float64_at_any_head_dimension(triton_device: str, head: int, dtype: torch.dtype) -> None:
    assert_equal_to_float64(inputs(triton_device, 5, 9, head, dtype, batch=1, heads=1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (3, 7), (7, 3), (32, 16), (33, 49), (50, 33)])
def test_kernels_equal_float64_at_any_length(triton_device: str, rows: int, keys: int, causal: bool) -> None:
    assert_equal_to_float64(inputs(triton_device, rows, keys, 16, batch=1, heads=1), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_equal_float64_beyond_the_tiles_of_halves(triton_device: str, causal: bool) -> None:
    assert_equal_to_float64(inputs(triton_device, 129, 130, 16, torch.float16, batch=1, heads=1), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_beyond_a_samples_length_are_never_read(triton_device: str, dtype: torch.dtype, causal: bool) -> None:
    lengths = torch.tensor([35, 17, 1, 0], dtype=torch.int32, device=triton_device)
    tensors = inputs(triton_device, 7, 35, 16, dtype, batch=4, heads=1)
    for tensor in (*tensors[1:3], *tensors[4:]):
        for sample, length in enumerate(lengths.tolist()):
            tensor[sample, :, length:] = float("nan")
    assert_equal_to_float64(tensors, causal=causal, lengths=lengths)
    out, d_out = attend_with_tangent(*tensors, causal=causal, lengths=lengths)
    assert not out[3].any()
    assert not d_out[3].any()


@pytest.mark.parametrize("length", [-1, 0, 9, 1000])
def test_lengths_beyond_the_range_count_as_its_ends(triton_device: str, length: int) -> None:
    tensors = inputs(triton_device, 5, 9, 16)
    lengths = torch.full((2,), length, dtype=torch.int32, device=triton_device)
    expected = torch.zeros_like(tensors[0]) if length <= 0 else attend(*tensors[:3])
    torch.testing.assert_close(attend(*tensors[:3], lengths=lengths), expected)
    torch.testing.assert_close(attention_reference(*tensors[:3], lengths=lengths), expected)


def packed(tensors: list[Tensor]) -> list[Tensor]:
    """Heads inside rows, and query, key and value inside those: what one linear layer gives."""
    stacked = [torch.stack(tensors[begin : begin + 3], 3).transpose(1, 2).contiguous() for begin in (0, 3)]
    return [tensor.transpose(1, 2) for together in stacked for tensor in together.unbind(3)]


LAYOUTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "packed": packed,
    "columns first": lambda tensors: [tensor.mT.contiguous().mT for tensor in tensors],
    "batch last": lambda tensors: [tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for tensor in tensors],
    "expanded": lambda tensors: [tensor[:1, :1].expand_as(tensor) for tensor in tensors],
    "off 16 bytes": lambda tensors: [nn.functional.pad(tensor, (1, 2))[..., 1:-2] for tensor in tensors],
    "tangents apart": lambda tensors: [*packed(tensors)[:3], *tensors[3:]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_take_any_strides(triton_device: str, layout: str) -> None:
    tensors = LAYOUTS[layout](inputs(triton_device, 9, 9, 16))
    assert not all(tensor.is_contiguous() for tensor in tensors)
    assert_equal_to_float64(tensors)


def test_output_keeps_heads_inside_rows(triton_device: str) -> None:
    """So that a transformer's next linear layer reads it without a copy."""
    tensors = packed(inputs(triton_device, 9, 9, 16))
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in attend_with_tangent(*tensors))


def test_kernels_address_beyond_2_to_the_31(triton_device: str) -> None:
    """Rows that are 2^31 numbers apart, of which only what is used ever gets memory on a CPU."""
    storage = torch.empty(2**31 + 48, dtype=torch.float16, device=triton_device)
    tensors = [storage.as_strided((1, 1, 2, 16), (0, 0, 2**31, 1), 16 * place) for place in range(3)]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    near = [tensor.clone() for tensor in tensors]
    torch.testing.assert_close(attend(*tensors), attend(*near), rtol=0, atol=0)
    direction = torch.randn_like(near[0])
    for found, expected in zip(gradients(attend, tensors, direction), gradients(attend, near, direction), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_attention_of_nothing(triton_device: str, batch: int, rows: int, keys: int) -> None:
    tensors = inputs(triton_device, rows, keys, 16, batch=batch)
    for value in (*attend_with_tangent(*tensors), *attention_with_tangent_reference(*tensors)):
        assert value.shape == tensors[0].shape
        assert not value.any()
    for gradient, tensor in zip(gradients(attend, tensors[:3], tensors[0]), tensors, strict=False):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_large_scores_do_not_overflow(triton_device: str, dtype: torch.dtype) -> None:
    """Scores up to some 30,000, whose exponentials no format holds; their last bit in float32 is worth 2e-3."""
    query, key, value, d_query, d_key, d_value = inputs(triton_device, 9, 40, 16, dtype)
    tensors = [60 * query, 60 * key, value, d_query / 60, d_key / 60, d_value]
    out, d_out = attend_with_tangent(*tensors)
    expected, d_expected = exact(*tensors)
    assert_close(out, expected, 4e-3 + TOLERANCE[dtype])
    assert_close(d_out, d_expected, 4e-3 + TOLERANCE[dtype])
    for gradient in gradients(attend, tensors[:3], torch.ones_like(out)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
def test_scale_is_that_of_torch(triton_device: str, scale: float) -> None:
    query, key, value = inputs(triton_device, 9, 40, 16)[:3]
    expected = scaled_dot_product_attention(query, key, value, scale=scale)
    torch.testing.assert_close(attend(query, key, value, scale=scale), expected)
    torch.testing.assert_close(attention_reference(query, key, value, scale=scale), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(9, 9), (5, 9), (9, 5)])
def test_attention_is_torchs(device: str, rows: int, keys: int, causal: bool) -> None:
    query, key, value = inputs(device, rows, keys, 20)[:3]  # 20 is no multiple of 8: the reference everywhere
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(attention(query, key, value, causal), expected)


def test_kernel_is_torchs_attention(triton_device: str, dtype: torch.dtype) -> None:
    query, key, value = inputs(triton_device, 40, 40, 24, dtype)[:3]
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(attend(query, key, value, causal=True), expected, TOLERANCE[dtype])


def test_tangent_is_the_limit_of_differences(device: str) -> None:
    """Central differences in float64, whose error is of the second order in the step."""
    tensors = [tensor.double() for tensor in inputs(device, 5, 7, 8)]
    lengths = torch.tensor([7, 4], dtype=torch.int32, device=device)
    step = 1e-5
    ahead, behind = (
        attention(
            *(primal + sign * step * d for primal, d in zip(tensors[:3], tensors[3:], strict=True)), True, 0.7, lengths
        )
        for sign in (1, -1)
    )
    out, d_out = attention_with_tangent(*tensors, True, 0.7, lengths)
    torch.testing.assert_close(d_out, (ahead - behind) / (2 * step), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(out, attention(*tensors[:3], True, 0.7, lengths))


def test_reference_is_differentiable_twice(device: str) -> None:
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)
    tensors = [tensor.double().requires_grad_() for tensor in inputs(device, 2, 3, 2, heads=1)[:3]]
    function = partial(attention_reference, lengths=lengths)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("given", range(8))
def test_a_tangent_that_is_none_is_zero(triton_device: str, given: int) -> None:
    tensors = inputs(triton_device, 5, 40, 16)
    tangents = [tangent if given >> place & 1 else None for place, tangent in enumerate(tensors[3:])]
    zeros = [torch.zeros_like(full) if some is None else full for some, full in zip(tangents, tensors[3:], strict=True)]
    out, d_out = attend_with_tangent(*tensors[:3], *tangents)
    expected, d_expected = exact(*tensors[:3], *zeros)
    assert_close(out, expected, TOLERANCE[torch.float32])
    assert_close(d_out, d_expected, TOLERANCE[torch.float32])


class Transformer(nn.Module):
    """Two blocks of self-attention and one of cross-attention to a constant context."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm = nn.LayerNorm(16)
        self.embed = nn.Linear(1, 16)
        self.projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.feed = nn.Linear(16, 16)
        self.register_buffer("context", torch.randn(2, 5, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.embed(t[:, None, None])
        for projection, context in zip(self.projections, (None, self.context, None), strict=True):
            normed = self.norm(x)
            query = projection(normed).chunk(3, -1)[0]
            key, value = projection(normed if context is None else context).chunk(3, -1)[1:]
            parts = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (query, key, value))
            x = x + self.attend(*parts).transpose(1, 2).flatten(2)
            x = x + self.feed(nn.functional.silu(x))
        return x


@pytest.fixture
def twins(triton_device: str) -> tuple[Transformer, Transformer]:
    """The same network with the kernels and with the reference."""
    fused, plain = Transformer(attend).to(triton_device), Transformer(attention_reference).to(triton_device)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.fixture
def direction(triton_device: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A network's input, and MeanFlow's tangent of it: the velocity, and 1 for the time."""
    x, velocity = torch.randn(2, 2, 7, 16, device=triton_device)
    return (x, torch.rand(2, device=triton_device)), (velocity, torch.ones(2, device=triton_device))


Direction = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Twins = tuple[Transformer, Transformer]


def test_a_networks_jvp_is_that_without_the_kernel(twins: Twins, direction: Direction) -> None:
    found, expected = (torch.func.jvp(network, *direction) for network in twins)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dual_numbers_go_through_the_kernel(twins: Twins, direction: Direction) -> None:
    found = []
    for network in twins:
        with forward_ad.dual_level():
            out = network(*(forward_ad.make_dual(*pair) for pair in zip(*direction, strict=True)))
            found.append(forward_ad.unpack_dual(out))
    torch.testing.assert_close(tuple(found[0]), tuple(found[1]), rtol=1e-4, atol=1e-5)


def test_tangents_that_are_symbolic_zeros_are_left_out(triton_device: str) -> None:
    query, key, value, d_query = inputs(triton_device, 5, 5, 8)[:4]
    with forward_ad.dual_level():
        nothing = torch._efficientzerotensor(key.shape, device=key.device)
        out = attend(forward_ad.make_dual(query, d_query), forward_ad.make_dual(key, nothing), value)
        d_out = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(d_out, attend_with_tangent(query, key, value, d_query, None, None)[1])


@pytest.mark.parametrize("detached_inside", [False, True])
def test_gradients_flow_through_the_output_of_a_jvp(twins: Twins, direction: Direction, detached_inside: bool) -> None:
    """As sCM and MeanFlow train: the target holds the tangent, and is a constant."""
    for network in twins:
        with torch.set_grad_enabled(not detached_inside):
            tangent = torch.func.jvp(network, *direction)[1].detach()
        out = network(*direction[0]) if detached_inside else torch.func.jvp(network, *direction)[0]
        (out - tangent).square().sum().backward()
    for found, expected in zip(*(network.parameters() for network in twins), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_functional_gradients_go_through_the_kernels(twins: Twins, direction: Direction) -> None:
    """Also around a jvp."""

    def loss(parameters: dict[str, Tensor], network: Transformer) -> Tensor:
        call = partial(torch.func.functional_call, network, parameters)
        out, tangent = torch.func.jvp(lambda *x: call(x), *direction)
        return (out - tangent.detach()).square().sum()

    found, expected = (torch.func.grad(loss)(dict(network.named_parameters()), network) for network in twins)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_tangents_gradient_is_refused(triton_device: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(triton_device, 5, 5, 8)]
    _, d_out = attend_with_tangent(*tensors)
    with pytest.raises(NotImplementedError, match="detach it"):
        d_out.sum().backward()


def test_second_derivatives_are_refused(triton_device: str) -> None:
    query, key, value, d_query = inputs(triton_device, 5, 5, 8)[:4]

    def gradient(query: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda query: attend(query, key, value).square().sum())(query)
        return found

    with pytest.raises(NotImplementedError, match="take the tangent first"):
        torch.func.jvp(gradient, (query,), (d_query,))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda query: gradient(query).sum())(query)
    (first,) = torch.autograd.grad(attend(query.requires_grad_(), key, value).square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_dispatch_equals_the_reference(device: str) -> None:
    tensors = inputs(device, 5, 9, 16)
    lengths = torch.tensor([9, 2], dtype=torch.int32, device=device)
    found = attention_with_tangent(*tensors, causal=True, lengths=lengths)
    torch.testing.assert_close(found, attention_with_tangent_reference(*tensors, causal=True, lengths=lengths))
    torch.testing.assert_close(found[0], attention(*tensors[:3], causal=True, lengths=lengths))


def test_halves_are_computed_in_float32(device: str) -> None:
    """Scores of 16 * 100 * 100 = 160,000 are beyond float16."""
    query = torch.full((1, 1, 3, 16), 100.0, dtype=torch.float16, device=device)
    out = attention(query, query, query)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, query)


def test_what_does_not_fit_together_is_refused(device: str) -> None:
    query, key, value, d_query, *_ = inputs(device, 3, 5, 8)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    for wrong in (value[:, :1], value[:, :, :4], value[..., :4], value[:1], value[0]):
        with pytest.raises(ValueError, match=r"\(B, H, M, D\), not \(2, 2, 3, 8\)"):
            attention(query, key, wrong)
    with pytest.raises(ValueError, match="one dtype"):
        attention(query.half(), key, value)
    with pytest.raises(ValueError, match="a tangent has the shape and dtype"):
        attention_with_tangent(query, key, value, None, d_query)
    for wrong in (lengths[:1], lengths.long()):
        with pytest.raises(ValueError, match=r"lengths are \(2,\) int32"):
            attention(query, key, value, lengths=wrong)


COMPILE = """
import json
from fewstep.kernels.attention_triton import configurations
from fewstep.kernels.compilation import compile_kernel

for dtype in ("fp32", "fp16"):
    for configuration in configurations(dtype):
        print(json.dumps([f"{configuration.name} {dtype}", compile_kernel(configuration, 86).shared_bytes]))
"""


def test_tiles_fit_the_shared_memory_of_small_gpus(tmp_path: Path) -> None:
    """A program has 99 KiB of it on capabilities 86, 89 and 120, whose tensor cores take the same instructions."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton to compile the kernels")
    # Another process: triton's interpreter, which the other tests choose, cannot compile.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 10
    for name, shared in rows:
        assert 0 < shared <= 99 * 1024, name
