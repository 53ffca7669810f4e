"""`Pipeline`: prompts in, pictures out, on whichever engine is there."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .artefact import Card, read_card, require_steps
from .edit import DEFAULT_STRENGTH, stack
from .engines import COMPILED, ENGINES, PIXELS, TORCH, Arrays, Engines, Found, Preview, open_export, open_fitting
from .engines.auto import open_fastest
from .engines.parts import open_parts
from .errors import FewstepError
from .families import Model, load_model
from .files import atomic_path
from .networks import Networks
from .noise import trajectory_noise
from .prompt_cache import engine_prompts
from .wording import either

A_PROMPT = "a red apple"
"""What `auto` draws to measure."""
DEFAULT_TEACHER_STEPS = 50
MAX_BATCH = 32
STAGES = ("text", "noise", "network")
"""Of a generation, as timed; the network's includes the decoder and ends in pixels."""
MOST_TRAJECTORIES = 16
"""Settings (step count, sampler, guidance) that a pipeline keeps ready."""
NOT_THE_MODEL = ("training", "evaluation", "engines", "refused", ".*")
"""What lies beside a model and is not part of it."""

Callback = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What `Pipeline.generate` returns; every sequence has one entry an image, prompt after prompt.

    Args:
        arrays: (N, H, W, 3) uint8.
        prompts: the prompt of each image.
        seeds: the seed that makes this image again.
        steps: network evaluations of the sampler.
        timings: seconds by each of `STAGES`.
        engine: which engine ran.
    """

    arrays: npt.NDArray[np.uint8]
    prompts: list[str]
    seeds: list[int]
    steps: int
    timings: dict[str, float]
    engine: str

    @property
    def images(self) -> list[Image.Image]:
        """The images as PIL."""
        return [Image.fromarray(array) for array in self.arrays]


class Pipeline:
    """A teacher or a student, ready to generate.

    Make one with `Pipeline.from_pretrained`.
    """

    def __init__(
        self, directory: Path, card: Card, engine: str, device: torch.device, cuda_graphs: bool = False
    ) -> None:
        self.directory, self.card, self.device = directory, card, device
        self._wanted, self._cuda_graphs = engine, cuda_graphs
        self._engines: dict[tuple[Any, ...], Engines] = {}
        self._parts: dict[tuple[Path, int], Networks] = {}

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, engine: str = "auto", device: str = "auto", cuda_graphs: bool = False
    ) -> "Pipeline":
        """Open a model directory.

        Args:
            directory: what `fewstep train` wrote, or a diffusers directory, which is a teacher.
            engine: `torch`, or `torch-compiled`; one that was exported, such as `onnx` or, with its precision,
                `onnx-int8`; or `auto` for the fastest of them all on this machine, measured when it first starts, and
                on a CPU for the fastest number of threads, which holds for the process; a teacher's is torch.
            device: torch's device for the torch engine; `auto` takes CUDA where there is one.
            cuda_graphs: on a GPU, the torch engine captures each batch size once and replays it as one launch.

        Raises:
            FewstepError: the directory is not a model, or the engine is unknown, missing or stale.
        """
        target = engine.partition("-")[0]
        if engine not in ("auto", TORCH, COMPILED) and target not in ENGINES:
            raise FewstepError(f"unknown engine {engine!r}: choose {either(['auto', TORCH, COMPILED, *ENGINES])}")
        card = read_card(Path(directory))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = cls(Path(directory), card, engine, torch.device(device), cuda_graphs)
        pipeline._engines_for(pipeline._steps(None), *pipeline._sampling(None, None))
        return pipeline

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy the model, whole or not at all, without what training and export left beside it.

        Raises:
            FewstepError: the directory cannot be written, or is the model's own.
        """
        target = Path(directory)
        if target.resolve() == self.directory.resolve():
            raise FewstepError(f"{target} is where this model already lies: give another directory")
        with atomic_path(target) as temporary:
            shutil.copytree(self.directory, temporary, ignore=shutil.ignore_patterns(*NOT_THE_MODEL))

    @property
    def model(self) -> Model:
        """The torch networks, loaded when first needed."""
        return self._torch.model

    @cached_property
    def _torch(self) -> Networks:
        return Networks("torch", load_model(self.directory, self.device), self.device, self._cuda_graphs)

    @cached_property
    def _compiled(self) -> Networks:
        return replace(self._torch, name=COMPILED, compiled=True)

    @property
    def edits(self) -> bool:
        """Whether `generate` can start from an image."""
        counts = self.card.steps or [DEFAULT_TEACHER_STEPS]
        return self._wanted in ("auto", "torch") and max(counts) > 1

    @property
    def engine_name(self) -> str:
        """The engine that the default step count runs on."""
        return self._default.name

    @property
    def engine_reason(self) -> str:
        """Why `auto` took it; empty if it was asked for by name."""
        return self._default.reason

    def generate(
        self,
        prompt: str | Sequence[str],
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        guidance: float | None = None,
        sampler: str | None = None,
        batch_size: int = MAX_BATCH,
        callback: Callback | None = None,
        negative_prompt: str = "",
        preview: Preview | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
    ) -> Result:
        """Generate `count` images for each prompt. One seed gives one image, whatever the batch.

        Args:
            prompt: a prompt or several.
            steps: network evaluations; a student takes only those it was distilled for.
            seed: of the first image of each prompt, the next ones counting up; or one seed per image.
            count: images a prompt.
            guidance: classifier-free guidance scale of a teacher, 1 switching it off; or the scale that a student takes
                as an input, within the range it knows.
            sampler: a name in `SAMPLERS`, for a teacher.
            batch_size: images per engine call.
            callback: called with (images done, images in all) after each engine call.
            negative_prompt: what a teacher's guidance leads away from.
            preview: called with pixels (B, H, W, 3) that each network evaluation foresees, the last being the result;
                never where an engine makes all evaluations in one call, as exports of a whole trajectory do.
            image: to start from, one for all or one a prompt, scaled and cropped to the model's size; torch draws then.
            strength: in (0, 1): the share of the steps that is taken, and so how little of the image stays.

        Raises:
            FewstepError: no prompt, a count or step count that is not possible, a seed or scale out of range, a
                negative prompt without guidance, a strength that leaves no step.
        """
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(count)]
        _check_prompts(prompts, count, batch_size)
        seeds = _seeds(seed, count, len(prompts))
        chosen_steps = self._steps(steps)
        sampler, scale = self._sampling(guidance, sampler)
        if negative_prompt and (self.card.kind == "student" or scale == 1):
            raise FewstepError("a negative prompt needs classifier-free guidance: give a teacher and a scale above 1")
        if strength is not None and image is None:
            raise FewstepError("a strength says how much of an image to replace: give the image too")
        if image is not None and strength is None:
            strength = DEFAULT_STRENGTH
        engines, pictures = self._engines_for(chosen_steps, sampler, scale, negative_prompt, strength), None
        if image is not None:
            pictures = _pictures(image, count, len(prompts), *self._torch.size)
        if preview and engines.watched:
            engines = engines.watched(preview)
        timings = dict.fromkeys(STAGES, 0.0)
        arrays = []
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            given = {} if pictures is None else {"image": pictures[chunk]}
            arrays.append(self._batch(engines, prompts[chunk], seeds[chunk], scale, timings, given))
            if callback:
                callback(min(start + batch_size, len(prompts)), len(prompts))
        return Result(np.concatenate(arrays), prompts, seeds, chosen_steps, timings, engines.name)

    def _batch(
        self,
        engines: Engines,
        prompts: list[str],
        seeds: list[int],
        scale: float,
        timings: dict[str, float],
        given: Arrays | None = None,
    ) -> npt.NDArray[np.uint8]:
        clock = [time.perf_counter()]
        condition = self._condition(engines, prompts, scale) | (given or {})
        clock.append(time.perf_counter())
        noise = trajectory_noise(seeds, engines.draws, engines.sample_shape)
        clock.append(time.perf_counter())
        pixels = engines.trajectory(noise=noise, **condition)[PIXELS]
        clock.append(time.perf_counter())
        for stage, (begin, end) in zip(STAGES, pairwise(clock), strict=True):
            timings[stage] += end - begin
        return pixels

    def _condition(self, engines: Engines, prompts: list[str], scale: float) -> Arrays:
        assert engines.prompts is not None
        condition = engines.prompts(prompts)
        if self.card.guidance_range:
            condition["guidance"] = np.full(len(prompts), scale, np.float32)
        return condition

    def _steps(self, steps: int | None) -> int:
        known = self.card.steps
        if steps is None:
            return known[0] if known else DEFAULT_TEACHER_STEPS
        if steps < 1:
            raise FewstepError(f"{steps} steps are not possible: give at least 1")
        if known:
            require_steps("this student", known, steps)
        return steps

    def _sampling(self, guidance: float | None, sampler: str | None) -> tuple[str, float]:
        """The sampler, and the scale of classifier-free guidance or of a student's own input."""
        card, scale = self.card, self.card.guidance if guidance is None else guidance
        if card.kind != "student":
            return sampler or card.sampler, scale
        if sampler not in (None, card.sampler) or (card.guidance_range is None and guidance not in (None, 1.0)):
            raise FewstepError("a student has its guidance and sampler built in: leave both out")
        if card.guidance_range is None:
            return card.sampler, 1.0
        low, high = card.guidance_range
        if not low <= scale <= high:
            raise FewstepError(f"this student knows guidance from {low:g} to {high:g}: {scale:g} lies outside")
        return card.sampler, scale

    @property
    def _default(self) -> Engines:
        return self._engines_for(self._steps(None), *self._sampling(None, None))

    def _engines_for(
        self, steps: int, sampler: str, scale: float, negative_prompt: str = "", strength: float | None = None
    ) -> Engines:
        """With a strength, what starts from an image: torch, since exports neither have the encoder nor start late."""
        if strength is not None and self._wanted not in ("auto", TORCH):
            raise FewstepError(
                f"image-to-image runs on torch, not on {self._wanted}: open the model with torch or auto"
            )
        is_student = self.card.kind == "student"
        guidance = 1.0 if is_student else scale
        setting = (steps, sampler, guidance, negative_prompt)
        key = (*setting, strength)
        if key not in self._engines:
            if len(self._engines) >= MOST_TRAJECTORIES:  # scales are floats: a server may meet any number of them
                del self._engines[next(iter(self._engines))]
            if strength is not None or self._wanted == TORCH or (self._wanted == "auto" and not is_student):
                self._engines[key] = self._open_torch(*setting, strength)
            elif self._wanted == COMPILED:
                self._engines[key] = self._open_compiled(*setting)
            else:
                self._engines[key] = self._open_exported(*setting)
        return self._engines[key]

    def _open_torch(
        self, steps: int, sampler: str, guidance: float, negative_prompt: str, strength: float | None = None
    ) -> Engines:
        return self._torch.engines(self.card, steps, sampler, guidance, negative_prompt, strength=strength)

    def _open_compiled(self, steps: int, sampler: str, guidance: float, negative_prompt: str) -> Engines:
        return self._compiled.engines(self.card, steps, sampler, guidance, negative_prompt)

    def _open_exported(self, steps: int, sampler: str, guidance: float, negative_prompt: str) -> Engines:
        """Of a trajectory and an export in parts, the first; for `auto`, the fastest of both and torch."""
        keys = {count: self.card.engine_key(count) for count in (steps, None)}
        if self.card.kind != "student":
            del keys[steps]
        setting = (steps, sampler, guidance, negative_prompt)

        def open_found(found: Found) -> Engines:
            folder, manifest = found
            if manifest.shape == "fused":
                engines = open_export(found)
                return replace(engines, prompts=engine_prompts(engines))
            place = folder, torch.get_num_threads()  # which its sessions take, and keep
            if place not in self._parts:
                model = open_parts(self.directory, found)
                self._parts[place] = Networks(manifest.engine, model, torch.device("cpu"))
            return self._parts[place].engines(self.card, *setting)

        def call(engines: Engines) -> Callable[[], object]:
            _, scale = self._sampling(None, None)
            return lambda: self._batch(engines, [A_PROMPT], [0], scale, dict.fromkeys(STAGES, 0.0))

        if self._wanted != "auto":
            return open_fitting(self.directory, self._wanted, keys, open_found)
        in_torch = {TORCH: partial(self._open_torch, *setting)}
        if self.device.type == "cuda":  # a CPU takes a minute to compile what OpenVINO outruns
            in_torch[COMPILED] = partial(self._open_compiled, *setting)
        engines = open_fastest(self.directory, keys, self.device, in_torch, open_found, call)
        if engines.name != COMPILED:
            vars(self).pop("_compiled", None)
        if engines.name not in in_torch:
            vars(self).pop("_torch", None)  # its networks, if they were measured
        self._parts = {place: each for place, each in self._parts.items() if each.prompts is engines.prompts}
        return engines


def _check_prompts(prompts: list[str], count: int, batch_size: int) -> None:
    if count < 1 or batch_size < 1:
        raise FewstepError("the count of images and the batch size must be at least 1")
    if not prompts:
        raise FewstepError("there is no prompt: give at least one")
    if any(not text.strip() for text in prompts):
        raise FewstepError("a prompt is empty: say what to draw")


def _pictures(
    image: Image.Image | Sequence[Image.Image], count: int, images: int, height: int, width: int
) -> npt.NDArray[np.uint8]:
    """(images, H, W, 3): the one picture for all, or each prompt's `count` times."""
    if isinstance(image, Image.Image):
        return stack([image], width, height).repeat(images, axis=0)
    if len(image) * count != images:
        raise FewstepError(f"{len(image)} pictures were given for {images // count} prompts: give one each, or one")
    return stack(image, width, height).repeat(count, axis=0)


def _seeds(seed: int | Sequence[int], count: int, images: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + index % count for index in range(images)]
    if len(seed) != images:
        raise FewstepError(f"{len(seed)} seeds were given for {images} images: give one each, or a single number")
    return list(seed)
