"""The networks of a model, in torch or as the parts of an export, and the engines that one setting makes of them."""

from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from .artefact import Card
from .engines import Engines, Preview
from .engines.torch import torch_engines
from .families import Model
from .prompt_cache import PromptCache, torch_prompts
from .samplers import get_sampler
from .schedule import uniform_times
from .text import PromptEncoder
from .trajectory import Trajectory, to_pixels


@dataclass(frozen=True)
class Networks:
    """What draws at any setting.

    Args:
        name: `torch`, or the engine's.
        model: network, decoder and text encoder.
        device: where torch computes what lies between the parts.
        cuda_graphs: on a GPU, capture each batch size once and replay it as one launch.
    """

    name: str
    model: Model
    device: torch.device
    cuda_graphs: bool = False

    @cached_property
    def text_encoder(self) -> PromptEncoder:
        """The encoder of prompts, loaded when first needed."""
        return self.model.load_text_encoder()

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
    ) -> Engines:
        """Noise and condition to pixels.

        Args:
            card: the model's.
            steps: network evaluations.
            sampler: a name in `SAMPLERS`.
            guidance: scale of classifier-free guidance, 1 switching it off.
            negative_prompt: what the guidance leads away from.
            preview: called with the pixels that each evaluation foresees.
        """
        times = card.times.get(str(steps)) or uniform_times(steps)
        negative = None
        if guidance != 1:
            negative = {name: value.to(self.device) for name, value in self.text_encoder([negative_prompt]).items()}
        watch = partial(_show, preview) if preview else None
        trajectory = Trajectory(self.model, get_sampler(sampler), times, guidance, negative, watch)
        captured = self.cuda_graphs and not preview  # a replay calls nobody
        engines = torch_engines(trajectory, self.model.sample_shape, self.device, cuda_graphs=captured)
        watched = partial(self.engines, card, steps, sampler, guidance, negative_prompt)
        return replace(engines, name=self.name, prompts=self.prompts, watched=watched)


def _show(preview: Preview, images: Tensor) -> None:
    preview(to_pixels(images).cpu().numpy())
