"""One seed gives one image on every engine, whatever else is drawn at the time."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from fewstep.export.export import export_student
from fewstep.runtime.engines.device import computes_bf16

from ..served import Server
from ..tiny_models import save_tiny
from .conftest import start_server

MOST_LEVELS = {"torch": 1, "onnx-fp32": 1, "openvino-fp32": 1, "openvino-bf16": 8}
"""By which a pixel may differ between batch sizes, each rounding otherwise; bf16 keeps 8 bits, as a pixel does."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("company") / "student", "student", [1])


def draw(server: Server, seed: int) -> Any:
    body = {"prompt": f"a square {seed}", "seed": seed}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).raise_for_status().json()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))).astype(int)


@pytest.mark.parametrize("engine", MOST_LEVELS)
def test_an_image_does_not_depend_on_its_company(student: Path, engine: str, tmp_path: Path) -> None:
    target, _, precision = engine.partition("-")
    if target != "torch":
        for library in ("onnxscript", {"onnx": "onnxruntime"}.get(target, target)):
            pytest.importorskip(library)
        if precision == "bf16" and not computes_bf16():
            pytest.skip("this processor does not compute bf16")
        export_student(student, target, precision=precision)
    # The tiny student may be drawn sooner than the next request comes: its engine waits for company.
    server = start_server(tmp_path / "log.jsonl", student, "--engine", engine, "--linger", "100")
    try:
        alone = [draw(server, seed) for seed in range(12)]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda seed: draw(server, seed), range(12)))
        metrics = httpx.get(f"{server.url}/metrics").text
    finally:
        server.stop()
    apart = [np.abs(one - other).max() for one, other in zip(alone, together, strict=True)]
    assert max(apart) <= MOST_LEVELS[engine]
    others = [np.abs(one - other).max() for one, other in pairwise(alone)]
    assert min(others) > MOST_LEVELS[engine]  # the seeds' images are told apart by more than that
    images, batches = (
        float(metrics.split(f"fewstep_batch_images_{part}{{")[1].split()[1]) for part in ("sum", "count")
    )
    assert images > batches  # some were drawn together
