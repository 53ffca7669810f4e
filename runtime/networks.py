"""The networks of a model, in torch or as the parts of an export, and the engines that one setting makes of them."""

from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from .artefact import Card
from .edit import first_step
from .engines import Engines, Preview
from .engines.torch import TorchEngine
from .families import Model
from .prompt_cache import PromptCache, torch_prompts
from .samplers import get_sampler
from .schedule import uniform_times
from .text import PromptEncoder
from .trajectory import EditedPixels, Pixels, Trajectory, to_pixels


@dataclass(frozen=True)
class Networks:
    """What draws at any setting.

    Args:
        name: `torch`, or the engine's.
        model: network, decoder and text encoder.
        device: where torch computes what lies between the parts.
        cuda_graphs: on a GPU, capture each batch size once and replay it as one launch.
        compiled: through `torch.compile`, once for each batch size.
    """

    name: str
    model: Model
    device: torch.device
    cuda_graphs: bool = False
    compiled: bool = False

    @cached_property
    def text_encoder(self) -> PromptEncoder:
        """The encoder of prompts, loaded when first needed."""
        return self.model.load_text_encoder()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        with torch.inference_mode():
            height, width = self.model.decoder(torch.zeros(1, *self.model.sample_shape, device=self.device)).shape[-2:]
        return height, width

    @cached_property
    def prompts(self) -> PromptCache:
        """The prompts that it has met."""
        return torch_prompts(self.text_encoder)

    def engines(
        self,
        card: Card,
        steps: int,
        sampler: str,
        guidance: float,
        negative_prompt: str = "",
        preview: Preview | None = None,
        strength: float | None = None,
    ) -> Engines:
        """Noise and condition to pixels.

        Args:
            card: the model's.
            steps: network evaluations.
            sampler: a name in `SAMPLERS`.
            guidance: scale of classifier-free guidance, 1 switching it off.
            negative_prompt: what the guidance leads away from.
            preview: called with the pixels that each evaluation foresees.
            strength: of image-to-image: the trajectory starts late, from an `image` (B, H, W, 3) uint8.

        Raises:
            FewstepError: the strength leaves no step.
        """
        times = card.times.get(str(steps)) or uniform_times(steps)
        if strength is not None:
            times = times[first_step(steps, strength) :]
        negative = None
        if guidance != 1:
            negative = {name: value.to(self.device) for name, value in self.text_encoder([negative_prompt]).items()}
        watch = partial(_show, preview) if preview else None
        trajectory = Trajectory(self.model, get_sampler(sampler), times, guidance, negative, watch)
        captured = self.cuda_graphs and not preview  # a replay calls nobody
        module = Pixels(trajectory) if strength is None else EditedPixels(self.model.encoder, trajectory)
        compiled = self.compiled and not preview  # which would be compiled anew for every image
        engine = TorchEngine(module, self.device, cuda_graphs=captured, compiled=compiled)
        engines = Engines(self.name, engine, None, trajectory.draws, self.model.sample_shape, self.prompts)
        watched = partial(self.engines, card, steps, sampler, guidance, negative_prompt, strength=strength)
        return replace(engines, watched=watched)


def _show(preview: Preview, images: Tensor) -> None:
    preview(to_pixels(images).cpu().numpy())
