"""Attention's gradients: its kernels against float64, and how autograd takes output, tangent and gradient together."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.kernels.attention import attention_reference

from .attention_inputs import (
    LAYOUTS,
    TOLERANCE,
    Attend,
    assert_close,
    attend,
    attend_with_tangent,
    every_dtype,
    every_length,
    far_apart,
    gradients,
    inputs,
    without_the_rest,
)

# torch.func.jvp imports a part of torch that warns of another.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def assert_equal_to_float64(tensors: list[Tensor], **options: bool | Tensor | None) -> None:
    """Gradients of query, key and value along a random one of the output."""
    direction = torch.randn_like(tensors[0])
    found = gradients(partial(attend, **options), tensors[:3], direction)
    wide = [tensor.double() for tensor in tensors[:3]]
    expected = gradients(partial(attention_reference, **options), wide, direction.double())
    for each, wanted, tensor in zip(found, expected, tensors, strict=False):
        assert each.dtype == tensor.dtype
        assert_close(each, wanted, TOLERANCE[tensor.dtype])


@pytest.mark.parametrize("head", [8, 64, 72, 128])
@every_dtype
def test_kernels_equal_float64_at_any_head_dimension(triton_device: str, head: int, dtype: torch.dtype) -> None:
    assert_equal_to_float64(inputs(triton_device, 5, 9, head, dtype, batch=1, heads=1))


@pytest.mark.parametrize("causal", [False, True])
@every_length
def test_kernels_equal_float64_at_any_length(triton_device: str, rows: int, keys: int, causal: bool) -> None:
    assert_equal_to_float64(inputs(triton_device, rows, keys, 16, batch=1, heads=1), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_equal_float64_beyond_the_tiles_of_halves(triton_device: str, causal: bool) -> None:
    assert_equal_to_float64(inputs(triton_device, 65, 67, 16, torch.float16, batch=1, heads=1), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@every_dtype
def test_keys_beyond_a_samples_length_are_never_read(triton_device: str, dtype: torch.dtype, causal: bool) -> None:
    lengths = torch.tensor([20, 17, 1, 0], dtype=torch.int32, device=triton_device)
    tensors = without_the_rest(inputs(triton_device, 7, 20, 16, dtype, batch=4, heads=1), lengths)
    assert_equal_to_float64(tensors, causal=causal, lengths=lengths)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tangents apart"])
def test_kernels_take_any_strides(triton_device: str, layout: str) -> None:
    assert_equal_to_float64(LAYOUTS[layout](inputs(triton_device, 9, 9, 16)))


def test_kernels_address_beyond_2_to_the_31(triton_device: str) -> None:
    far = far_apart(triton_device)
    near = [tensor.clone() for tensor in far]
    direction = torch.randn_like(near[0])
    for found, expected in zip(gradients(attend, far, direction), gradients(attend, near, direction), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_gradients_of_nothing(triton_device: str, batch: int, rows: int, keys: int) -> None:
    tensors = inputs(triton_device, rows, keys, 16, batch=batch)
    for gradient, tensor in zip(gradients(attend, tensors[:3], tensors[0]), tensors, strict=False):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


@every_dtype
def test_large_scores_do_not_overflow(triton_device: str, dtype: torch.dtype) -> None:
    """Scores up to some 30,000, whose exponentials no format holds."""
    query, key, value = inputs(triton_device, 9, 40, 16, dtype, batch=1)[:3]
    for gradient in gradients(attend, [60 * query, 60 * key, value], torch.ones_like(query)):
        assert gradient.isfinite().all()


def test_reference_is_differentiable_twice(device: str) -> None:
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)
    tensors = [tensor.double().requires_grad_() for tensor in inputs(device, 2, 3, 2, heads=1)[:3]]
    function = partial(attention_reference, lengths=lengths)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


class Transformer(nn.Module):
    """Two blocks of self-attention and one of cross-attention to a constant context."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm = nn.LayerNorm(16)
        self.embed = nn.Linear(1, 16)
        self.projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.feed = nn.Linear(16, 16)
        self.register_buffer("context", torch.randn(1, 5, 16))

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
    x, velocity = torch.randn(2, 1, 7, 16, device=triton_device)
    return (x, torch.rand(1, device=triton_device)), (velocity, torch.ones(1, device=triton_device))


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
