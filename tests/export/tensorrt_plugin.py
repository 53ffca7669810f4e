"""What `tensorrt.plugin` of TensorRT 10.9 to 11 does with plugins until it launches one: its rules, without TensorRT.

It refuses what the original refuses, by the original's source: signatures, annotations, names, types of what is given
back. Sizes are symbols, which have a value once there is a batch.
"""

import enum
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16"])
op = types.SimpleNamespace()
registry: dict[str, types.SimpleNamespace] = {}


class SymInt32:
    """A whole number that may depend on the batch; None where TensorRT asks for types alone."""

    def __init__(self, value: Any) -> None:
        self.of: Callable[[int], int] | None = value.of if isinstance(value, SymInt32) else lambda _: int(value)

    def _with(self, other: Any, compute: Callable[[int, int], int]) -> "ShapeExpr":
        if not isinstance(other, int | SymInt32):
            raise TypeError(type(other))
        mine, theirs = self.of, SymInt32(other).of
        return ShapeExpr(None if mine is None or theirs is None else lambda batch: compute(mine(batch), theirs(batch)))

    def __add__(self, other: Any) -> "ShapeExpr":
        return self._with(other, lambda a, b: a + b)

    def __mul__(self, other: Any) -> "ShapeExpr":
        return self._with(other, lambda a, b: a * b)

    def __floordiv__(self, other: Any) -> "ShapeExpr":
        return self._with(other, lambda a, b: a // b)


class ShapeExpr(SymInt32):
    """A size."""

    def __init__(self, of: Callable[[int], int] | None) -> None:
        self.of = of


class SymIntExprs:
    """Whole numbers for a kernel."""

    def __init__(self, length: int) -> None:
        self.items: list[Any] = [None] * length

    def __setitem__(self, place: int, value: Any) -> None:
        if not isinstance(value, SymInt32):
            raise TypeError(f"Extra args must be a 'tensorrt.plugin.SymInt32'.  Got: {type(value)}.")
        self.items[place] = value


class KernelLaunchParams:
    """Grid, block and shared memory."""

    def __init__(self, grid_x: Any = 1, block_x: Any = 1, shared_mem: Any = 0) -> None:
        self.grid_x, self.block_x, self.shared_mem = SymInt32(grid_x), SymInt32(block_x), SymInt32(shared_mem)


class TensorDesc:
    """Type and sizes of a tensor; what a plugin is given cannot be changed."""

    def __init__(self, sizes: list[Any], dtype: Any, fixed: bool = False) -> None:
        self.shape_expr = tuple(sizes) if fixed else list(sizes)
        self.dtype = dtype

    def like(self) -> "TensorDesc":
        return TensorDesc(list(self.shape_expr), self.dtype)


def cdiv(first: Any, second: Any) -> ShapeExpr:
    if isinstance(first, int):
        raise ValueError("Both arguments cannot be 'int's")
    return first._with(second, lambda a, b: -(-a // b))  # type: ignore[no-any-return]


def register(plugin_id: str) -> Callable[[Any], Any]:
    namespace, name = plugin_id.split("::")
    if "." in plugin_id or namespace in ("", "trt", "tensorrt", "std"):
        raise ValueError(plugin_id)

    def decorator(function: Any) -> Any:
        space = vars(op).setdefault(namespace, types.SimpleNamespace())
        if hasattr(space, name):
            raise ValueError(f"'_Op' already has a definition for '{name}'")
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            named = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            bare = parameter.default is inspect.Parameter.empty
            if not named or not bare or not issubclass(parameter.annotation, TensorDesc):
                raise ValueError(f"this is no input without attributes: {parameter}")
        results = typing.get_args(signature.return_annotation)
        if typing.get_origin(signature.return_annotation) is not tuple or any(
            each is not TensorDesc for each in results
        ):
            raise ValueError(f"Return types can only be TensorDesc or Tuple[TensorDesc], not {results}")
        registry[plugin_id] = types.SimpleNamespace(
            describe=function, inputs=list(signature.parameters), results=len(results)
        )
        setattr(space, name, registry[plugin_id])
        return function

    return decorator


def aot_impl(plugin_id: str) -> Callable[[Any], Any]:
    def decorator(function: Any) -> Any:
        signature, plugin = inspect.signature(function), registry[plugin_id]
        if list(signature.parameters) != [*plugin.inputs, "outputs", "tactic"]:
            raise ValueError(f"Signature of the aot_impl function '{signature}' does not match")
        made = typing.get_args(signature.return_annotation)
        if typing.get_origin(signature.return_annotation) is not tuple or len(made) != 4:
            raise ValueError(f"Return annotation is {signature.return_annotation}")
        texts = [set(typing.get_args(each)) or {each} for each in made[:2]]
        if any(not text <= {str, bytes} for text in texts) or made[2:] != (KernelLaunchParams, SymIntExprs):
            raise ValueError(f"Return annotation is {signature.return_annotation}")
        plugin.build = function
        return function

    return decorator


def built(plugin_id: str, shapes: list[tuple[int | None, ...]], dtype: str) -> dict[str, Any]:
    """What TensorRT learns of a plugin: first the types of its results, then their sizes, then its kernel."""
    plugin, kind = registry[plugin_id], DataType[dtype]
    unknown = [TensorDesc([ShapeExpr(None)] * len(shape), kind, fixed=True) for shape in shapes]
    assert [each.dtype for each in plugin.describe(*unknown)] == [kind] * plugin.results
    inputs = [TensorDesc([_size(size) for size in shape], kind, fixed=True) for shape in shapes]
    outputs = plugin.describe(*inputs)
    assert len(outputs) == plugin.results
    name, ptx, launch, extra = plugin.build(*inputs, list(outputs), 0)
    assert isinstance(name, str)
    assert isinstance(ptx, str)
    return {
        "name": name,
        "ptx": ptx,
        "results": [[each.of(3) for each in output.shape_expr] for output in outputs],
        "grid": [launch.grid_x.of(batch) for batch in (1, 3)],
        "extra": [[each.of(batch) for each in extra.items] for batch in (1, 3)],
        "threads": launch.block_x.of(1),
        "shared_bytes": launch.shared_mem.of(1),
    }


def _size(size: int | None) -> ShapeExpr:
    return ShapeExpr((lambda batch: batch) if size is None else lambda _: size)
