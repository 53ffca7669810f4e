"""An environment of its own for each peer that needs one.

`python -m fewstep.app.bench.environments [FOLDER] [NAME...]` makes them.
"""

import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import FewstepError
from ...runtime.files import read_json, write_json

ENVIRONMENTS = Path(".peers")
"""Where they lie by default."""
DONE = "installed.json"
TORCH = "torch==2.13.0"
"""First, and pinned in every step: the others would bring a newer one, with several gigabytes of CUDA."""


@dataclass(frozen=True)
class Environment:
    """What a peer runs on.

    Args:
        library: the peer itself, installed without what it asks for.
        needs: what it asks for and uses.
    """

    library: str
    needs: tuple[str, ...]


REQUIRED = {
    "optimum-onnx": Environment(
        "optimum-onnx==0.1.0",
        (
            "optimum==2.1.0",
            "transformers==4.57.6",
            "diffusers==0.39.0",
            "accelerate",
            "onnx==1.23.2",
            "onnxruntime==1.31.1",
        ),
    ),
    # It asks for torchvision, which asks for the newest torch, and which it does without.
    "optimum-intel": Environment(
        "optimum-intel==2.2.0",
        (
            "optimum==2.3.0",
            "transformers==5.5.4",
            "diffusers==0.39.0",
            "accelerate",
            "huggingface-hub==1.21.0",
            "nncf==3.4.0",
            "openvino==2026.4.1",
            "openvino-tokenizers==2026.4.1.0",
        ),
    ),
}


def python_of(folder: Path, peer: str) -> Path | None:
    """The interpreter of a peer's environment; None if it has not been installed as it must be."""
    return folder / peer / "bin" / "python" if _is_done(folder, peer) else None


def install(folder: Path, peer: str) -> None:
    """Make a peer's environment anew, unless it is there already.

    Raises:
        FewstepError: pip failed, which has said why.
    """
    if _is_done(folder, peer):
        return
    target, required = folder / peer, REQUIRED[peer]
    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, with_pip=True)
    for packages in ([TORCH], ["--no-deps", required.library], [TORCH, *required.needs]):
        pip = [str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, *packages], check=False).returncode:
            raise FewstepError(f"pip could not install {peer} into {target}: mend what it says above, run this again")
    write_json(target / DONE, _wanted(peer))


def _is_done(folder: Path, peer: str) -> bool:
    file = folder / peer / DONE
    return file.is_file() and read_json(file) == _wanted(peer)


def _wanted(peer: str) -> list[str]:
    return [TORCH, REQUIRED[peer].library, *REQUIRED[peer].needs]


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else ENVIRONMENTS
    try:
        for name in sys.argv[2:] or REQUIRED:
            install(chosen, name)
    except FewstepError as error:
        sys.exit(f"fewstep: {error}")
