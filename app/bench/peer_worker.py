"""One contender of `fewstep bench --peers`, by the Python of its own environment: imports nothing of fewstep.

Started with a job, which is JSON, as its argument, it opens what the job names, and answers every line of JSON that it
is sent with one: `{"prompts": [...], "save": PATH or null}` with seconds, `{}` with the peak memory.
"""

import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Draw = Callable[[list[str]], Any]
"""Prompts to pixels (B, H, W, 3) uint8."""


def serve(open_contender: Callable[[Job], Draw], export: Callable[[Job], None]) -> None:
    """Export what `job["export"]` asks for and end, or open a contender and draw until the input closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        job = json.loads(sys.argv[1])
        start = time.perf_counter()
        if job["export"]:
            export(job)
            answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
            return
        draw = open_contender(job)
        answers.write("{}\n")
        for line in sys.stdin:
            answers.write(json.dumps(_answer(draw, json.loads(line))) + "\n")
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps({"error": _sentence(error)}) + "\n")


def _answer(draw: Draw, request: dict[str, Any]) -> dict[str, float]:
    if "prompts" not in request:
        return {"peak_mebibytes": peak_mebibytes()}
    start = time.perf_counter()
    pixels = draw(request["prompts"])
    seconds = time.perf_counter() - start
    if request["save"]:
        import numpy as np

        np.save(request["save"], pixels)
    return {"seconds": seconds}


def peak_mebibytes() -> float:
    """The most that this process held; of a GPU's memory where torch finds one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    # The kernel's `ru_maxrss` begins at what the parent held when it started the process.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found:
        return int(found[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _sentence(error: Exception) -> str:
    said = next(iter(str(error).strip().splitlines()), "")
    return said if type(error).__name__ == "FewstepError" else f"{type(error).__name__}: {said}"


def _export(job: Job) -> None:
    if job["peer"] == "optimum-onnx":
        from optimum.exporters.onnx import onnx_export_from_model

        export = partial(onnx_export_from_model, do_validation=False, no_post_process=True)
    else:
        from optimum.exporters.openvino import export_from_model

        export = partial(export_from_model)
    shutil.rmtree(job["exported"], ignore_errors=True)  # an interrupted one
    pipeline = _stock(job, "float32")
    if job["inputs_hold_text"]:
        _stand_in(pipeline)
    export(pipeline, output=Path(job["exported"]), task="text-to-image")


def _stand_in(pipeline: Any) -> None:
    """A text encoder that never runs: optimum exports no pipeline without one."""
    from transformers import Gemma2Config, Gemma2Model

    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    pipeline.text_encoder = Gemma2Model(Gemma2Config(**shape, **heads))


def open_peer(job: Job) -> Draw:
    """The peer's pipeline, with as many threads as the job says."""
    import torch

    torch.set_num_threads(job["threads"])
    pipeline = {"diffusers": _open_diffusers, "optimum-onnx": _open_onnx, "optimum-intel": _open_openvino}[job["peer"]](
        job
    )
    pipeline.set_progress_bar_config(disable=True)
    return _drawer(pipeline, job)


def _open_diffusers(job: Job) -> Any:
    pipeline = _stock(job, "bfloat16" if job["precision"] == "bf16" else "float32")
    if job["compiled"]:
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        for part in (network, pipeline.vae.decoder):
            part.compile(dynamic=False)
    return pipeline


def _stock(job: Job, precision: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    absent = {"text_encoder": None, "tokenizer": None} if job["inputs_hold_text"] else {}
    dtype = getattr(torch, precision)
    return DiffusionPipeline.from_pretrained(job["model"], torch_dtype=dtype, local_files_only=True, **absent)


def _open_onnx(job: Job) -> Any:
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTDiffusionPipeline

    options = SessionOptions()
    options.intra_op_num_threads = job["threads"]
    return ORTDiffusionPipeline.from_pretrained(job["exported"], export=False, session_options=options)


def _open_openvino(job: Job) -> Any:
    from optimum.intel import OVDiffusionPipeline

    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[job["precision"]],
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    return OVDiffusionPipeline.from_pretrained(job["exported"], ov_config=hints)


def _drawer(pipeline: Any, job: Job) -> Draw:
    import numpy as np
    import torch

    with np.load(job["inputs"], allow_pickle=False) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if job["inputs_hold_text"]:
        fixed = {"use_resolution_binning": False, "negative_prompt": None}
    else:
        fixed = {}
        # The pipelines of Stable Diffusion, unlike Sana's, leave given latents as they are.
        inputs["latents"] = inputs["latents"].to(getattr(pipeline.unet, "dtype", torch.float32))

    def draw(prompts: list[str]) -> Any:
        rows = {name: tensor[: len(prompts)] for name, tensor in inputs.items()}
        text = {} if job["inputs_hold_text"] else {"prompt": prompts}
        images = pipeline(**text, **rows, **fixed, num_inference_steps=1, guidance_scale=1.0, output_type="np").images
        return (255 * images).round().astype(np.uint8)

    return draw


if __name__ == "__main__":
    serve(open_peer, _export)
