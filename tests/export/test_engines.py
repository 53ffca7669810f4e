"""Exported engines draw what torch draws, and are opened only if they are what was exported from these weights."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime import Pipeline
from fewstep.runtime.artefact import read_card
from fewstep.runtime.engines import Engines, open_engines
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.noise import gaussian_noise
from fewstep.runtime.text import load_tokenizer

PROMPTS = ["a cat", "a dog on a bicycle, flat style", "moon"]
TARGETS = ("onnx", "openvino")
# A value may round to the byte next to torch's; bf16 moves some by one, and other CPUs by more.
LARGEST = {"onnx": 1, "openvino": 4}
# Other batch sizes take other kernels: they sum in another order, and in bf16 round elsewhere (measured: 0.0025).
BATCH_TOLERANCE = {"onnx": 1e-5, "openvino": 0.01}


def open_engine(directory: Path, wanted: str) -> Engines | None:
    return open_engines(directory, wanted, 1, read_card(directory).engine_key(1))


def inputs(engines: Engines, batch: int) -> tuple[dict[str, Any], Any]:
    tokens = load_tokenizer()([PROMPTS[index % 3] for index in range(batch)])
    noise = gaussian_noise(range(batch), 0, engines.sample_shape)[:, None]
    return {name: value.numpy() for name, value in tokens.items()}, noise


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def change_manifest(directory: Path, target: str, **values: object) -> None:
    path = next((directory / "engines").glob(f"{target}-*")) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    replace(path, json.dumps({**manifest, **values}).encode())


@pytest.mark.parametrize("target", TARGETS)
def test_same_seeds_give_the_images_of_torch(exported: Path, target: str) -> None:
    expected = Pipeline.from_pretrained(exported, engine="torch").generate(PROMPTS, seed=7)
    result = Pipeline.from_pretrained(exported, engine=target).generate(PROMPTS, seed=7)
    assert result.engine == target
    difference = np.abs(result.arrays.astype(int) - expected.arrays)
    assert difference.max() <= LARGEST[target]
    assert np.abs(np.diff(expected.arrays.astype(int), axis=0)).max() > 2 * LARGEST[target]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_does_not_depend_on_its_batch(exported: Path, target: str) -> None:
    engines = open_engine(exported, target)
    assert engines is not None
    tokens, noise = inputs(engines, 5)
    together = engines(tokens, noise)
    for index in range(5):
        one = slice(index, index + 1)
        alone = engines({name: value[one] for name, value in tokens.items()}, noise[one])
        np.testing.assert_allclose(alone[0], together[index], atol=BATCH_TOLERANCE[target])


@pytest.mark.parametrize("target", TARGETS)
def test_calls_from_several_threads_do_not_mix(exported: Path, target: str) -> None:
    engines = open_engine(exported, target)
    assert engines is not None
    batches = [inputs(engines, batch) for batch in (1, 2, 1, 3)]
    expected = [engines(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, image in zip(pool.map(lambda batch: engines(*batch), batches * 3), expected * 3, strict=True):
            np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize(("target", "file"), [("onnx", "text_encoder.onnx"), ("openvino", "trajectory.bin")])
def test_a_changed_graph_is_refused(changeable: Path, target: str, file: str) -> None:
    path = next((changeable / "engines").glob(f"{target}-*")) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))
    with pytest.raises(
        FewstepError, match=rf"its file {file} changed: run `fewstep export .* --to {target} --steps 1`"
    ):
        open_engine(changeable, target)
    path.unlink()
    with pytest.raises(FewstepError, match=f"lacks its file {file}"):
        open_engine(changeable, target)


def test_an_engine_of_other_weights_is_refused(exported: Path) -> None:
    with pytest.raises(FewstepError, match="built from other weights or for other times: run `fewstep export"):
        open_engines(exported, "onnx", 1, "0" * 64)
    assert open_engines(exported, "auto", 1, "0" * 64) is None


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"library": "onnxruntime 0.1"}, "was built with onnxruntime 0.1, and this is onnxruntime"),
        ({"processor": "Z80"}, r"was built on another machine \(Z80\)"),
        ({"format": 0}, "was exported by another version of fewstep: run `fewstep export"),
        ({"files": {}}, "lacks or misstates its times or files"),
        ({"milliseconds": {"engine": 1.0}}, "lacks or misstates 'torch'"),
        ({"steps": 2}, "lacks or misstates what its folder is named for"),
        ({"unknown": 1}, "lacks or misstates .*unknown"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(changeable: Path, changed: dict[str, Any], sentence: str) -> None:
    change_manifest(changeable, "onnx", **changed)
    with pytest.raises(FewstepError, match=sentence):
        open_engine(changeable, "onnx")


def test_what_was_not_exported_is_named_with_the_command_that_exports_it(student: Path, exported: Path) -> None:
    with pytest.raises(FewstepError, match=r"no openvino engine for 1 step: run `fewstep export .* --to openvino"):
        open_engine(student, "openvino")
    with pytest.raises(FewstepError, match=r"no onnx engine for 2 steps: run `fewstep export .* --steps 2`"):
        open_engines(exported, "onnx", 2, read_card(exported).engine_key(2))
    assert open_engine(student, "auto") is None


def test_a_missing_library_is_named_with_its_extra(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FewstepError, match=r'onnxruntime is not installed: pip install "fewstep\[onnx\]"'):
        open_engine(exported, "onnx")


@pytest.mark.parametrize(
    ("onnx", "openvino", "chosen"), [(20.0, 10.0, "openvino"), (10.0, 20.0, "onnx"), (110.0, 120.0, None)]
)
def test_auto_takes_the_fastest_at_export(changeable: Path, onnx: float, openvino: float, chosen: str | None) -> None:
    change_manifest(changeable, "onnx", milliseconds={"engine": onnx, "torch": 100.0})
    change_manifest(changeable, "openvino", milliseconds={"engine": openvino, "torch": 100.0})
    engines = open_engine(changeable, "auto")
    assert (engines and engines.name) == chosen


def test_auto_passes_over_what_it_cannot_use(changeable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_manifest(changeable, "onnx", milliseconds={"engine": 50.0, "torch": 100.0})
    change_manifest(changeable, "openvino", milliseconds={"engine": 10.0, "torch": 100.0})
    monkeypatch.setitem(sys.modules, "openvino", None)
    engines = open_engine(changeable, "auto")
    assert engines is not None
    assert engines.name == "onnx"
    change_manifest(changeable, "onnx", built_from="0" * 64)
    assert Pipeline.from_pretrained(changeable, engine="auto").engine_name == "torch"
