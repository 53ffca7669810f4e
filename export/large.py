"""Graphs of any size on disk: beyond 2 GiB no protobuf holds them, and their weights go into a file of their own."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LARGEST = 2**31 - 2**24
"""Bytes of weights in one file; the graph itself needs some too."""
SMALL = 1024
"""Bytes of a constant that stays in the graph, where shapes are computed from it."""
ALIGNMENT = 4096
"""Of every weight in the file, so that it can be mapped into memory."""


def is_large(model: Any) -> bool:
    """Whether an `onnx.ModelProto` does not fit into one file."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST


def save(model: Any, path: Path) -> None:
    """Write an `onnx.ModelProto`; the weights of a large one into `<path>_data`, as Hugging Face optimum names it."""
    import onnx

    if not is_large(model):
        onnx.save(model, path)
        return
    data = path.with_name(f"{path.name}_data")
    onnx.save(_without_weights(model, data.name), path)
    with data.open("wb") as file:
        for tensor in _weights(model):
            file.seek(_aligned(file.tell()))
            file.write(tensor.raw_data)


@contextmanager
def readable(model: Any) -> Iterator[Any]:
    """An `onnx.ModelProto` as libraries read it: its bytes, or the path of a file that goes with the block."""
    if not is_large(model):
        yield model.SerializeToString()
        return
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "model.onnx")
        yield Path(folder) / "model.onnx"


def digest(model: Any) -> str:
    """SHA-256 of an `onnx.ModelProto`."""
    if not is_large(model):
        return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    result = hashlib.sha256(_without_weights(model, "").SerializeToString(deterministic=True))
    for tensor in _weights(model):
        result.update(tensor.raw_data)
    return result.hexdigest()


def _weights(model: Any) -> list[Any]:
    return [tensor for tensor in model.graph.initializer if len(tensor.raw_data) > SMALL]


def _without_weights(model: Any, file: str) -> Any:
    """A copy whose weights lie in a file, one after another; it is never whole in memory twice."""
    from onnx import ModelProto, TensorProto

    copy = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    copy.functions.extend(model.functions)
    copy.graph.name = model.graph.name
    for part in ("node", "input", "output"):
        getattr(copy.graph, part).extend(getattr(model.graph, part))
    offset = 0
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= SMALL:
            copy.graph.initializer.append(tensor)
            continue
        place = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        place.data_location = TensorProto.EXTERNAL
        for key, value in {"location": file, "offset": offset, "length": len(tensor.raw_data)}.items():
            place.external_data.add(key=key, value=str(value))
        copy.graph.initializer.append(place)
        offset = _aligned(offset + len(tensor.raw_data))
    return copy


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
