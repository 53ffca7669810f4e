"""Triton source of the operations as TensorRT launches them: inference only, one launch each; imported to build alone.

TensorRT gives a kernel its inputs, then whole numbers, then its outputs; all else is constant. `launch` says what.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import language as tl

from .adaptive_norm_triton import forward_kernel as norm_rows
from .adaptive_norm_triton import forward_tile
from .compilation import Configuration
from .gated_linear_unit_triton import BLOCK, COLUMNS
from .gated_linear_unit_triton import forward_kernel as gate_halves
from .group_norm_chunks_triton import Layout
from .group_norm_triton import FORWARD_LIMIT, group_forward, held, warps_of
from .rotary_triton import forward_kernel as turn_heads
from .rotary_triton import tile_of

Shape = tuple[int | None, ...]
"""Of a tensor, None where the batch stands."""
Shapes = Mapping[str, Shape]
ALIGNED = 8
"""Numbers, 16 bytes in half precision: kernels read as many at once, so tensors have to begin at a multiple of it."""


@dataclass(frozen=True)
class Launch:
    """How TensorRT launches a kernel.

    Args:
        kernel: takes pointers of the inputs, whole numbers, and pointers of the outputs.
        constants: value of each compile-time parameter by its name; None of a pointer to what is not given.
        warps: 32 threads each, that run one program.
        counts: the whole numbers, for one sample: a kernel is given them times the batch.
        programs: `(count, share, times)` stands for `ceil(batch * count / share) * times` programs; all are added up.
    """

    kernel: Any
    constants: Mapping[str, Any]
    warps: int
    counts: tuple[int, ...] = ()
    programs: tuple[tuple[int, int, int], ...] = ()

    @property
    def pointers(self) -> list[str]:
        """The kernel's parameters that are tensors, inputs before outputs."""
        return [name for name in self.parameters if name.endswith("_pointer")]

    def numbers(self, batch: Any) -> list[Any]:
        """The whole numbers for a batch size, which may be a symbol."""
        return [batch * count for count in self.counts]

    def grid(self, batch: Any, ceil_divide: Callable[[Any, int], Any]) -> Any:
        """How many programs a batch takes; it may be a symbol, of which `ceil_divide` knows how it is divided."""
        first, *others = [ceil_divide(batch * count, share) * times for count, share, times in self.programs]
        return sum(others, start=first)

    def configuration(self, name: str, types: Sequence[str]) -> Configuration:
        """How the kernel is compiled.

        Args:
            name: of the configuration.
            types: of the tensors in Triton's words, `fp16` say, in the order of `pointers`.
        """
        known = dict(zip(self.pointers, types, strict=True))
        of_each = {each: f"*{known[each]}" if each in known else "i32" for each in self.parameters}
        return Configuration(name, self.kernel, of_each, self.constants, self.warps)

    @property
    def parameters(self) -> list[str]:
        """What the kernel is given, in order."""
        return [name for name in self.kernel.arg_names if name not in self.constants]


def launch(operator: str, shapes: Shapes, constants: Mapping[str, Any]) -> Launch | None:
    """How a call of an operator is launched; None for one that takes several launches, or sizes that are not known.

    Args:
        operator: its name in `operators.py`.
        shapes: of the tensors that are given, by parameter.
        constants: the values of the operator's other parameters.
    """
    build = _OPERATIONS.get(operator)
    x = next(iter(shapes.values()))
    others = [shape[1:] for name, shape in shapes.items() if name not in ("cos", "sin")]
    known = x[0] is None and all(size is not None for sizes in others for size in sizes)
    if build is None or not known or _product(x[2:]) % ALIGNED:
        return None
    return build(shapes=shapes, **constants)


def _norm(shapes: Shapes, epsilon: float = 0.0, kind: str | None = None) -> Launch | None:
    x, *rest = (name for name in shapes if name in ("x", "residual", "branch"))
    length, columns = _sizes(shapes[x])
    tile = forward_tile(1, length, columns)
    vectors = {name: _strides(shapes.get(name), length, columns) for name in ("gate", "scale", "shift")}
    if not tile["WHOLE"] or None in vectors.values():
        return None
    absent = {name for name in ("gate", "scale", "shift", "weight", "bias") if name not in shapes}
    absent |= set() if rest else {"branch", "stream"}
    absent |= {"normed"} if kind is None else set()
    strides: dict[str, int] = {}
    for name, found in vectors.items():
        assert found
        strides |= {f"{name.upper()}_BATCH_STRIDE": found[0], f"{name.upper()}_ROW_STRIDE": found[1]}
    by_row = strides["SCALE_ROW_STRIDE"] + strides["SHIFT_ROW_STRIDE"] > 0
    flags = {"KIND": kind, "GATE_BY_ROW": strides["GATE_ROW_STRIDE"] > 0, "BY_ROW": by_row, "EPSILON": epsilon}
    blocks, warps = triton.cdiv(length, tile["ROWS"]), tile.pop("num_warps")
    constants = _absent(absent) | strides | flags | tile | {"LENGTH": length, "BLOCKS": blocks}
    return Launch(norm, constants, warps, programs=((blocks, 1, 1),))


def _strides(shape: Shape | None, length: int, columns: int) -> tuple[int, int] | None:
    """Of a sample and of a row, in a vector that each has for itself, or shares; None for one of other sizes."""
    if shape is None:
        return 0, 0
    batch, rows = shape[0], 1 if len(shape) == 2 else shape[1]
    if shape[-1] != columns or rows not in (1, length) or batch not in (None, 1):
        return None
    return 0 if batch == 1 else rows * columns, columns if rows == length > 1 else 0


def _unit(shapes: Shapes, activation: str, dim: int) -> Launch | None:
    sizes = shapes["x"]
    dim %= len(sizes)
    if dim == 0:
        return None
    rows, half = _product(sizes[1:dim]), _product(sizes[dim:]) // 2
    if _product(sizes[2:]) // (1 if dim == 1 else 2) % ALIGNED:
        return None
    columns = min(triton.next_power_of_2(half), max(COLUMNS, BLOCK // triton.next_power_of_2(rows)))
    constants = {"HALF": half, "ACTIVATION": activation, "ROWS": BLOCK // columns, "COLUMNS": columns}
    return Launch(unit, constants, 4, (rows,), ((rows, BLOCK // columns, triton.cdiv(half, columns)),))


def _rotary(shapes: Shapes, epsilon: float, interleaved: bool) -> Launch | None:
    sizes = {name: _sizes(shapes[name]) for name in ("query", "key")}
    (query_length, query_heads, size), (key_length, key_heads, _) = sizes.values()
    tile = tile_of(*(torch.empty(1, *each, device="meta") for each in sizes.values()))
    absent = {name for name in ("query_weight", "key_weight", "cos", "sin") if name not in shapes}
    constants = (
        _absent(absent)
        | tile
        | {
            **{
                "QUERY_LENGTH": query_length,
                "QUERY_HEADS": query_heads,
                "KEY_LENGTH": key_length,
                "KEY_HEADS": key_heads,
            },
            **{"SIZE": size, "EPSILON": epsilon, "INTERLEAVED": bool(interleaved) or "cos" in absent},
        }
    )
    counts = (query_length, key_length)
    return Launch(rotary, constants, 4, counts, tuple((count, tile["TOKENS"], 1) for count in counts))


def _group_norm(shapes: Shapes, groups: int, epsilon: float, activation: bool) -> Launch | None:
    channels, *positions = _sizes(shapes["x"])
    layout = Layout(1, channels, _product(positions), groups, channels_last=False)
    tile = held(layout, FORWARD_LIMIT)
    if tile is None or any(shapes[name][0] is not None for name in ("scale", "shift") if name in shapes):
        return None
    absent = {name for name in ("weight", "bias", "scale", "shift") if name not in shapes}
    sizes = {"STRIDE": channels, "GROUP_COUNT": groups, "LENGTH": layout.positions}
    constants = _absent(absent) | tile | sizes | {"EPSILON": epsilon, "ACTIVATION": bool(activation)}
    return Launch(group_norm, constants, warps_of(tile), programs=((triton.cdiv(groups, tile["GROUPS"]), 1, 1),))


_OPERATIONS: Mapping[str, Callable[..., Launch | None]] = {
    "adaptive_norm": _norm,
    "gated_residual": _norm,
    "gated_residual_norm": _norm,
    "gated_linear_unit": _unit,
    "norm_rotary": _rotary,
    "group_norm_silu": _group_norm,
}


def _sizes(shape: Shape) -> tuple[int, ...]:
    """Of one sample."""
    return tuple(size for size in shape[1:] if size is not None)


def _product(sizes: Sequence[int | None]) -> int:
    return torch.Size([size or 0 for size in sizes]).numel()


def _absent(names: set[str]) -> dict[str, Any]:
    return {f"{name}_pointer": None for name in names}


@triton.jit  # type: ignore[untyped-decorator]
def norm(  # type: ignore[no-untyped-def]
    x_pointer, branch_pointer, gate_pointer, scale_pointer, shift_pointer, weight_pointer, bias_pointer,
    stream_pointer, normed_pointer,
    LENGTH: tl.constexpr, BLOCKS: tl.constexpr, EPSILON: tl.constexpr,
    GATE_BATCH_STRIDE: tl.constexpr, GATE_ROW_STRIDE: tl.constexpr, SCALE_BATCH_STRIDE: tl.constexpr,
    SCALE_ROW_STRIDE: tl.constexpr, SHIFT_BATCH_STRIDE: tl.constexpr, SHIFT_ROW_STRIDE: tl.constexpr,
    KIND: tl.constexpr, GATE_BY_ROW: tl.constexpr, BY_ROW: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gated residual, adaptive norm, or one after the other, of `LENGTH` rows a sample."""
    norm_rows(
        x_pointer, branch_pointer, gate_pointer, GATE_BATCH_STRIDE, GATE_ROW_STRIDE,
        scale_pointer, SCALE_BATCH_STRIDE, SCALE_ROW_STRIDE, shift_pointer, SHIFT_BATCH_STRIDE, SHIFT_ROW_STRIDE,
        weight_pointer, bias_pointer, stream_pointer, normed_pointer, None, LENGTH, BLOCKS, EPSILON,
        KIND, GATE_BY_ROW, BY_ROW, COLUMNS, ROWS, BLOCK, WHOLE,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def unit(  # type: ignore[no-untyped-def]
    x_pointer, rows, result_pointer,
    HALF: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gated linear unit of rows of two halves."""
    gate_halves(x_pointer, result_pointer, rows, HALF, ACTIVATION, ROWS, COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def rotary(  # type: ignore[no-untyped-def]
    query_pointer, key_pointer, query_weight_pointer, key_weight_pointer, cos_pointer, sin_pointer,
    query_tokens, key_tokens, turned_query_pointer, turned_key_pointer,
    QUERY_LENGTH: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_LENGTH: tl.constexpr, KEY_HEADS: tl.constexpr,
    SIZE: tl.constexpr, EPSILON: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Norm and rotary embedding of query and key, (B, N, H, `SIZE`) each."""
    turn_heads(
        query_pointer, query_weight_pointer, turned_query_pointer,
        query_tokens, QUERY_LENGTH, QUERY_HEADS, QUERY_LENGTH * QUERY_HEADS * SIZE, QUERY_HEADS * SIZE, SIZE,
        key_pointer, key_weight_pointer, turned_key_pointer,
        key_tokens, KEY_LENGTH, KEY_HEADS, KEY_LENGTH * KEY_HEADS * SIZE, KEY_HEADS * SIZE, SIZE,
        cos_pointer, sin_pointer, SIZE, EPSILON, tl.cdiv(query_tokens, TOKENS), INTERLEAVED, TOKENS, HEADS, HALF,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def group_norm(  # type: ignore[no-untyped-def]
    x_pointer, weight_pointer, bias_pointer, scale_pointer, shift_pointer, result_pointer,
    STRIDE: tl.constexpr, EPSILON: tl.constexpr, GROUP_COUNT: tl.constexpr, LENGTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, GROUP_CHANNELS: tl.constexpr, ACTIVATION: tl.constexpr,
    POSITIONS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Group normalisation of groups that a program holds whole."""
    group_forward(
        x_pointer, result_pointer, None, weight_pointer, bias_pointer, scale_pointer, shift_pointer, STRIDE, STRIDE,
        EPSILON, GROUP_COUNT, LENGTH, CHANNELS_LAST, GROUP_CHANNELS, ACTIVATION, POSITIONS, GROUPS, CHANNELS,
    )  # fmt: skip


def configurations(dtype: str) -> list[Configuration]:
    """Each kernel at sizes of DiT-XL, Sana and SD 1.5; `fp32`, `fp16` or `bf16`."""
    rows, vector = (None, 256, 1152), (1, 1, 1152)
    stream = {"residual": rows, "branch": rows, "gate": (None, 1, 1152), "scale": vector, "shift": vector}
    heads = {"query": (None, 4096, 24, 64), "key": (None, 4096, 24, 64), "cos": (4096, 64), "sin": (4096, 64)}
    cases: list[tuple[str, Shapes, dict[str, Any]]] = [
        ("gated_residual_norm", stream, {"epsilon": 1e-6, "kind": "layer"}),
        ("gated_linear_unit", {"x": (None, 5600, 32, 32)}, {"activation": "silu", "dim": 1}),
        ("norm_rotary", heads, {"epsilon": 1e-6, "interleaved": True}),
        ("group_norm_silu", {"x": (None, 1280, 16, 16)}, {"groups": 32, "epsilon": 1e-5, "activation": True}),
    ]
    found = []
    for operator, shapes, constants in cases:
        made = launch(operator, shapes, constants)
        assert made, operator
        found.append(made.configuration(operator, [dtype] * len(made.pointers)))
    return found
