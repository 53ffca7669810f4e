"""Linear layers in 8 bits: weights with one scale per output channel, activations with one per row, found as they come.

int8 is symmetric, -127..127; fp8 is e4m3, -448..448 (arXiv 2209.05433). A result is
`x_q @ w_q^T * row_scale * channel_scale + bias`: the product of the 8-bit values is scaled once, at the end.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .dispatch import runs_triton

Kind = Literal["int8", "fp8"]
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LIMITS: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest value of each kind, which a row's maximum becomes."""
LEAST_MAXIMUM = 1e-30
"""What a row's maximum counts as at least, so that the scale of a row of zeros and its inverse are ordinary floats."""


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A linear layer's weight in 8 bits.

    Args:
        values: (N, K) int8 or float8_e4m3fn, N output and K input channels.
        scales: (N,) float32; row n stands for `values[n] * scales[n]`.
    """

    values: Tensor
    scales: Tensor

    @property
    def kind(self) -> Kind:
        """`int8` or `fp8`, as the dtype of the values says."""
        return "int8" if self.values.dtype == torch.int8 else "fp8"

    def dequantise(self) -> Tensor:
        """(N, K) float32: the weight that the values and scales stand for."""
        return self.values.float() * self.scales[:, None]


@torch.no_grad()
def quantise_weight(weight: Tensor, kind: Kind) -> QuantisedWeight:
    """Round each output channel of an (N, K) weight to 8 bits, its largest magnitude to 127 or 448.

    Raises:
        ValueError: the kind is unknown, or a number of the weight is not finite.
    """
    if not weight.isfinite().all():
        raise ValueError("the weight has numbers that are not finite: there is no scale for them, quantise a sound one")
    return QuantisedWeight(*quantise_rows(weight, kind))


@torch.no_grad()
def quantise_rows(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Scale each row's largest magnitude to 127 or 448 and round to nearest, ties to even.

    A row of zeros stays zeros. A row with a number that is not finite becomes zeros under the scale NaN, so that all
    that is computed from it is NaN, and the other rows are as they would be without it.

    Args:
        x: (..., K), computed in float32.
        kind: `int8` or `fp8`.

    Returns:
        (..., K) int8 or float8_e4m3fn, and (...) float32: a row's scale, its maximum divided by 127 or 448.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in DTYPES:
        raise ValueError(f"there is no kind {kind!r} of 8-bit linear layer: choose one of {', '.join(DTYPES)}")
    if _runs_triton(kind, x):
        from .quantised_linear_triton import launch_quantise_rows

        values, scales = launch_quantise_rows(_rows(x), kind)
        return values[:, : x.shape[-1]].contiguous().view(x.shape), scales.view(x.shape[:-1])
    return quantise_rows_reference(x, kind)


def quantise_rows_reference(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    x = x.float()
    maximum = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = maximum < torch.inf  # False for NaN, which amax hands on
    maximum = maximum.clamp(min=LEAST_MAXIMUM)
    # A tensor: torch multiplies by the reciprocal of a number, which rounds twice.
    limit = torch.full_like(maximum, LIMITS[kind])
    scaled = torch.where(finite, x * (limit / maximum), 0.0).clamp(-LIMITS[kind], LIMITS[kind])
    values = (scaled.round() if kind == "int8" else scaled).to(DTYPES[kind])
    return values, torch.where(finite, maximum / limit, torch.nan).squeeze(-1)


def quantised_linear(x: Tensor, quantised: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """`x_q @ w_q^T * row_scale * channel_scale + bias`, with rows of `x` quantised as they come, for inference.

    Sums are exact for int8 (int32, K up to 2^17) and float32 for fp8. There are no gradients, so it refuses to be part
    of a graph. fp8 needs a GPU of compute capability 8.9; on an older one the reference does the work.

    Args:
        x: (..., K) float32 or narrower; a float64 is computed in float32.
        quantised: of shape (N, K).
        bias: (N,), or none.

    Returns:
        (..., N) in the dtype of `x`; NaN in the rows of `x` that are not finite.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: autograd asks for a gradient.
    """
    channels, size = quantised.values.shape
    if x.shape[-1:] != (size,) or (bias is not None and bias.shape != (channels,)):
        given = f"x {tuple(x.shape)}" + (f" and the bias {tuple(bias.shape)}" if bias is not None else "")
        raise ValueError(f"{given} do not fit a weight ({channels}, {size}): give (..., {size}) and ({channels},)")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError("a quantised linear layer has no gradients: call it under torch.no_grad()")
    if _runs_triton(quantised.kind, x, quantised.values, quantised.scales, bias):
        from .quantised_linear_triton import launch_quantised_linear

        return launch_quantised_linear(_rows(x), quantised, bias).view(*x.shape[:-1], channels)
    return quantised_linear_reference(x, quantised, bias)


def quantised_linear_reference(x: Tensor, quantised: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """The same in plain torch."""
    values, scales = quantise_rows_reference(x, quantised.kind)
    # float64 holds the sum of 8-bit integers exactly; few GPUs are fast at it, and fp8 gains nothing from it.
    wide = torch.float64 if quantised.kind == "int8" else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        total = (values.to(wide) @ quantised.values.to(wide).mT).float()
    result = total * scales[..., None] * quantised.scales
    return (result if bias is None else result + bias.float()).to(x.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _runs_triton(kind: Kind, x: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton does the work; older GPUs than Ada have no instructions for fp8."""
    return runs_triton(x, *others) and (kind == "int8" or torch.cuda.get_device_capability(x.device) >= (8, 9))


class QuantisedLinear(nn.Module):
    """`nn.Linear` for inference, its weight in 8 bits; changes of dtype pass it by, changes of device do not.

    Its state holds `values`, `scales` and, where there is one, `bias`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether it has one.
        kind: `int8` or `fp8`; a state of the other kind is refused.
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, kind: Kind) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("values", torch.zeros(out_features, in_features, dtype=DTYPES[kind]))
        self.register_buffer("scales", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_load_state_dict_pre_hook(_refuse_another_kind)  # type: ignore[no-untyped-call]

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: Kind) -> "QuantisedLinear":
        """Quantise a layer; the bias is kept in float32.

        Raises:
            ValueError: the kind is unknown, or a number of the weight is not finite.
        """
        quantised = quantise_weight(linear.weight, kind)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, kind)
        layer.values, layer.scales = quantised.values, quantised.scales
        if linear.bias is not None:
            layer.bias = linear.bias.detach().to(torch.float32, copy=True)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), see `quantised_linear`."""
        return quantised_linear(x, QuantisedWeight(self.values, self.scales), self.bias)

    def dequantise(self) -> nn.Linear:
        """The float32 layer whose weight is exactly what the 8 bits stand for."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        state = {"weight": QuantisedWeight(self.values, self.scales).dequantise(), "bias": self.bias}
        linear.load_state_dict({name: value for name, value in state.items() if value is not None}, assign=True)
        return linear

    def extra_repr(self) -> str:
        """What `print` shows: sizes and kind."""
        kind = QuantisedWeight(self.values, self.scales).kind
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={kind!r}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedLinear":
        """Half-precision scales, or widened values, would be another layer: keep the dtypes when all others change."""

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _refuse_another_kind(layer: nn.Module, state: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
    """Torch would copy int8 into fp8 and the other way round without a word."""
    given, wanted = state.get(f"{prefix}values"), layer.values
    if given is not None and given.dtype != wanted.dtype:
        errors: list[str] = arguments[-1]
        errors.append(
            f"{prefix}values are {given.dtype}, not {wanted.dtype}: build the layer of the kind that was saved"
        )
