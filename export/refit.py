"""A LoRA for a student: a student of its own, whose TensorRT engine is the old one with other weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.artefact import read_card, save_artefact
from ..runtime.engines.store import list_engines
from ..runtime.errors import FewstepError, first_line, require
from ..runtime.families import family_of, load_model
from ..runtime.files import sha256_of
from .export import ExportReport, check_request, export_source
from .source import Source


def refit_engine(student: Path, lora: Path, out: Path, precision: str | None = None) -> ExportReport:
    """Add a LoRA to a student, and give a copy of its tensorrt engine the new weights: seconds instead of a build.

    The engine is kept if its images agree with torch's, of the student with the LoRA, by the limits of an export.

    Args:
        student: has a tensorrt engine for this machine, of its first step count.
        lora: a safetensors file as `fewstep train` with a `lora_rank`, peft or diffusers write it.
        out: the new student's directory.
        precision: of the engine; None takes the fastest on this machine.

    Raises:
        FewstepError: TensorRT or a GPU is missing, there is no such engine, the LoRA is for another network, or the
            engine did not pass the gate; the new student is there then, without an engine.
    """
    request = check_request("tensorrt", precision)
    plain = Source(student)
    engines = [
        each for each in list_engines(student) if (each.target, each.precision) == ("tensorrt", request.precision)
    ]
    usable = [each.folder for each in engines if each.steps == plain.steps and not each.reason]
    if not usable:
        raise FewstepError(
            f"{student} has no tensorrt engine in {request.precision} for this machine: "
            f"run `fewstep export {student} --to tensorrt --precision {request.precision}` once"
        )
    if out.exists():
        raise FewstepError(f"{out} is there already: give --out a new directory")
    save_merged(student, lora, out)
    return export_source(Source(out), replace(request, built=usable[0]))


def save_merged(student: Path, lora: Path, out: Path) -> None:
    """Write a student whose weights have a LoRA added; see `refit_engine`."""
    card, family = read_card(student), family_of(student)
    network = load_model(student, torch.device("cpu")).network
    merge(network, lora, family.NETWORK)
    kept = {name: value for name, value in card.raw.items() if name != "weights"}
    origin = {"student": card.weights, "adapter": sha256_of(lora)}
    save_artefact(
        out, lambda folder: family.save_student(folder, network, student, card.sampler), kept | {"lora": origin}
    )


def merge(network: Any, lora: Path, part: str) -> None:
    """Add a LoRA to a network's weights.

    Args:
        network: of diffusers; changed in place.
        lora: the file.
        part: what the file calls the network: `transformer` or `unet`.

    Raises:
        FewstepError: the file is missing or no LoRA, or is for another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require("peft", "train")
    try:
        weights = load_file(lora)
    except (OSError, SafetensorError) as error:
        raise FewstepError(f"cannot read {lora}: give the safetensors file of a LoRA") from error
    layers = {name.split(".lora")[0].removeprefix(f"{part}.") for name in weights}
    known = dict(network.named_modules())
    strange = sorted(layer for layer in layers if layer not in known)
    if strange or not layers:
        raise FewstepError(
            f"{lora} is for another network than this {part}: it adapts {strange[0] if strange else 'nothing'}"
        )
    try:
        network.load_lora_adapter(weights, prefix=part)
        network.fuse_lora(safe_fusing=True)
    except (RuntimeError, ValueError) as error:
        raise FewstepError(f"{lora} does not fit this {part}: {first_line(error)}") from error
    network.unload_lora()
