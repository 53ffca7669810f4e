"""What every contender of `fewstep bench --peers` draws with, and what each is given to draw from."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.artefact import read_card
from ...runtime.errors import FewstepError
from ...runtime.files import atomic_path, read_json
from .worker import prompts

STUDENT = "student"
DECODERS = {"kl": "the full KL decoder", "tiny": "the tiny decoder (`AutoencoderTiny`)"}
BIG = "sd-1.5-"


@dataclass(frozen=True)
class Subject:
    """A student, the same files for all contenders.

    Args:
        name: for tables.
        folder: where its files lie; another for other weights.
        note: what work is compared.
        batches: images a call.
        make: writes the model into a folder that is not there yet.
        together: all contenders are held in memory at once and take turns; otherwise one at a time, the first again at
            the end.
        holds_text: contenders are given the prompts' states, because stock pipelines know the network and the decoder,
            but not the text encoder.
    """

    name: str
    folder: str
    note: str
    batches: tuple[int, ...]
    make: Callable[[Path], object]
    together: bool
    holds_text: bool

    def prompts(self, batch: int, call: int) -> list[str]:
        """Those of a call: always the same where only their states are given, and new ones where text is encoded."""
        return prompts(batch, 0 if self.holds_text else call)


def find_subject(name: str, student: Path) -> Subject:
    """A subject by name.

    Args:
        name: `student`, or `sd-1.5-` and one of `DECODERS`.
        student: what the first is made of.

    Raises:
        FewstepError: there is none of that name.
    """
    if name == STUDENT:
        return student_subject(student)
    if name.removeprefix(BIG) not in DECODERS or not name.startswith(BIG):
        known = " or ".join([STUDENT, *(BIG + decoder for decoder in DECODERS)])
        raise FewstepError(f"there is no subject {name!r}: choose {known}")
    return big_subject(name.removeprefix(BIG))


def student_subject(directory: Path) -> Subject:
    """A small student as it is: prompt states and noise to pixels."""
    return Subject(
        STUDENT,
        f"{STUDENT}-{read_card(directory).weights[:8]}",
        f"{directory.name}: one step from the states of fixed prompts to uint8 pixels; peers by their `SanaPipeline`. "
        "They know the network and the decoder, but not the text encoder: they are given the prompts' states, which "
        "ours looks up in its prompt cache, and the noise, which ours makes anew in each call. optimum exports no "
        "pipeline without a text encoder: a stand-in of one layer is exported with it and never runs.",
        batches=(1, 8),
        make=lambda folder: copy_model(directory, folder),
        together=True,
        holds_text=True,
    )


def big_subject(decoder: str) -> Subject:
    """Stable Diffusion 1.5 by size, with random weights: prompts to pixels."""
    from .big_model import build

    return Subject(
        BIG + decoder,
        BIG + decoder,
        f"A student as large as Stable Diffusion 1.5 (860M parameters, CLIP-L, {DECODERS[decoder]}), weights random, "
        "one step from a prompt that no call has met before to 512x512 uint8 pixels; peers by their "
        "`StableDiffusionPipeline`. They are given the noise, which ours makes anew in each call.",
        batches=(1,),
        make=lambda folder: build(folder, decoder),
        together=False,
        holds_text=False,
    )


def make_model(subject: Subject, work: Path) -> Path:
    """The subject's directory under `work`, made when first needed."""
    directory = work / subject.folder / "model"
    if not directory.is_dir():
        with atomic_path(directory) as temporary:
            subject.make(temporary)
    return directory


def save_inputs(subject: Subject, directory: Path, path: Path) -> None:
    """Write as `.npz` what peers are given: `latents` (B, C, h, w) of the seeds from 0 on, and text states if need be.

    Raises:
        FewstepError: it is no student of one step.
    """
    import numpy as np

    from ...runtime.noise import gaussian_noise

    card = read_card(directory)
    if card.kind != "student" or card.steps[0] != 1:
        raise FewstepError(f"{directory} is not a student of one step: peers are compared at one")
    arrays: dict[str, Any] = {"latents": gaussian_noise(range(max(subject.batches)), 0, _sample_shape(directory))}
    if subject.holds_text:
        from ...runtime.text import load_text_encoder

        states = load_text_encoder()(subject.prompts(max(subject.batches), 0))
        arrays["prompt_embeds"] = states["encoder_hidden_states"].numpy()
        arrays["prompt_attention_mask"] = states["encoder_attention_mask"].numpy()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def copy_model(directory: Path, to: Path) -> None:
    """Copy a model without its engines."""
    from ...runtime.pipeline import NOT_THE_MODEL

    shutil.copytree(directory, to, ignore=shutil.ignore_patterns(*NOT_THE_MODEL))


def _sample_shape(directory: Path) -> tuple[int, int, int]:
    network = "transformer" if (directory / "transformer").is_dir() else "unet"
    config = read_json(directory / network / "config.json")
    return config["in_channels"], config["sample_size"], config["sample_size"]
