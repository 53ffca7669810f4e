"""Opens an export in parts with Hugging Face optimum, in an environment of its own, and draws with it.

`python optimum_worker.py onnx|openvino FOLDER INPUTS.npz PICTURES.npy`
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def opened(target: str, folder: str) -> Any:
    """Its pipeline of the class that the folder's index names."""
    if target == "onnx":
        from optimum.onnxruntime import ORTDiffusionPipeline

        return ORTDiffusionPipeline.from_pretrained(folder, export=False, local_files_only=True)
    from optimum.intel import OVDiffusionPipeline

    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    return OVDiffusionPipeline.from_pretrained(folder, export=False, local_files_only=True, ov_config=hints)


def main(target: str, folder: str, inputs: str, pictures: str) -> None:
    """Draw the prompts in `prompts.json` beside the inputs."""
    given = np.load(inputs)
    pipeline = opened(target, folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(given["noise"])
    spacing: dict[str, Any] = {"num_inference_steps": int(given["steps"])}
    if "sigmas" in given:
        spacing = {"sigmas": given["sigmas"].tolist()}
    torch.manual_seed(int(given["seed"]))
    torch.randn_like(noise)  # its scheduler goes on drawing where the first noise ended
    size = int(given["size"])
    prompts = json.loads(Path(inputs).with_name("prompts.json").read_text())
    result = pipeline(prompts, latents=noise, guidance_scale=1.0, height=size, width=size, output_type="np", **spacing)
    np.save(pictures, result.images)


if __name__ == "__main__":
    main(*sys.argv[1:])
