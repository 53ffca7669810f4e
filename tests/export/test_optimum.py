"""Hugging Face optimum opens an export in parts as it is, and draws the same.

FEWSTEP_PEERS names the folder of its environments; `python -m fewstep.app.bench.environments` makes them.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.export.export import check_request, export_source, open_source
from fewstep.runtime.artefact import read_card
from fewstep.runtime.families import load_model
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import uniform_times
from fewstep.runtime.trajectory import Trajectory

from ..families.conftest import save_stable_diffusion, save_stable_diffusion_3
from ..family_models import save_student

PEERS = os.environ.get("FEWSTEP_PEERS", "")
ENVIRONMENTS = {"onnx": "optimum-onnx", "openvino": "optimum-intel"}
PROMPTS = ["a red cat", "two leaves"]
STEPS, SEED, SIZE = 2, 5, 16

pytestmark = pytest.mark.skipif(not PEERS, reason="FEWSTEP_PEERS names no folder with optimum's environments")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """No bars from loading and saving."""
    from fewstep.runtime.quiet import quiet

    with quiet("diffusers"), quiet("transformers"):
        yield


@pytest.fixture(scope="module", params=["sd", "sd3"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two steps, with the tokenizers' older files, which optimum's transformers read."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sd":
        teacher = save_stable_diffusion(folder, "epsilon")
    else:
        teacher = save_stable_diffusion_3(folder, t5=False)
    for tokenizer in teacher.glob("tokenizer*"):
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(folder / file, tokenizer / file)
    return save_student(folder / "student", teacher, [STEPS])


@pytest.mark.parametrize("target", ENVIRONMENTS)
def test_optimum_opens_an_export_and_draws_the_same(student: Path, target: str, tmp_path: Path) -> None:
    python = Path(PEERS).absolute() / ENVIRONMENTS[target] / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no {python}")
    folder = export_source(open_source(student, "parts"), check_request(target, "fp32")).folder
    torch.manual_seed(SEED)
    noise = torch.stack([torch.randn(2, 4, 8, 8) for _ in range(STEPS)], dim=1)
    given: dict[str, Any] = {"noise": noise[:, 0].numpy(), "steps": STEPS, "seed": SEED, "size": SIZE}
    if (folder / "transformer").is_dir():
        given["sigmas"] = np.array(uniform_times(STEPS)[:-1])
    np.savez(tmp_path / "inputs.npz", **given)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    worker = Path(__file__).with_name("optimum_worker.py")
    files = [str(tmp_path / "inputs.npz"), str(tmp_path / "pictures.npy")]
    outcome = subprocess.run([python, "-P", worker, target, folder, *files], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    np.testing.assert_allclose(np.load(files[1]), ours(student, noise), rtol=0, atol=1e-4)


def ours(directory: Path, noise: torch.Tensor) -> Any:
    model, card = load_model(directory, torch.device("cpu")), read_card(directory)
    trajectory = Trajectory(model, get_sampler(card.sampler), card.times[str(STEPS)])
    with torch.inference_mode():
        return trajectory(noise, **model.load_text_encoder()(PROMPTS)).permute(0, 2, 3, 1).numpy()
