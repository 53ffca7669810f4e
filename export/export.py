"""`fewstep export`: a student and a step count become an engine, checked and measured before it is kept."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..runtime.artefact import Card, read_card, weights_hash
from ..runtime.engines import ENGINES, TEXT_ENCODER, TRAJECTORY, Engines, engine_module, load_engines
from ..runtime.engines.manifest import Manifest, key_of, processor, read_manifest, refusal, write_manifest
from ..runtime.engines.torch import TorchEngine
from ..runtime.errors import FewstepError
from ..runtime.families import load_model
from ..runtime.files import atomic_path, sha256_of
from ..runtime.samplers import get_sampler
from ..runtime.text import TextEncoder
from ..runtime.trajectory import CONDITION, Trajectory
from . import onnx, openvino
from .graph import TextStates, text_encoder_graph, trajectory_graph
from .parity import PROMPTS, check_parity, make_inputs

TIMED_RUNS = 20


@dataclass(frozen=True)
class Target:
    """A file format that graphs are exported to, and the engine of that name loads.

    Args:
        precisions: gives what it can be built in on this machine, the default first.
        write: `write(graph, folder, name, precision)` writes one `onnx.ModelProto`.
    """

    precisions: Callable[[], tuple[str, ...]]
    write: Callable[[Any, Path, str, str], None]


TARGETS: dict[str, Target] = {
    "onnx": Target(onnx.precisions, onnx.write),
    "openvino": Target(openvino.precisions, openvino.write),
}
"""Every target by name; a new one is a file here, a file in `runtime/engines` and a line in each table."""
