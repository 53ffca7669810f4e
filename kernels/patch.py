"""Fused operations in the networks of diffusers, put in and taken out again without touching a weight."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

from torch import Tensor, nn

from . import dispatch

Sites = Mapping[str, int]
"""How often a layer calls each operation."""


@dataclass(frozen=True)
class Rule:
    """A layer that has a fused forward.

    Args:
        layer: module and name of its class, which must be exactly this one: `diffusers.models.resnet.ResnetBlock2D`.
        forward: called with the layer and its arguments; returns NotImplemented for those that it does not cover.
        sites: operations that `forward` calls, given the layer.
        part: name of the attribute that is fused in the layer's place: a child, or an attention's `processor`.
        accepts: whether `forward` covers how this layer was built.
    """

    layer: str
    forward: Callable[..., Any]
    sites: Callable[[Any], Sites]
    part: str = ""
    accepts: Callable[[Any], bool] = lambda layer: True


def apply(module: nn.Module) -> dict[str, int]:
    """Put fused operations into every layer of a network that has them; twice is once.

    Parameters, buffers, hooks and names stay as they are; layers of unknown classes, subclasses too, are left alone.
    On a CPU and in forward-mode differentiation the network computes as before, bit for bit. It is copied and saved as
    before, too, but cannot be pickled. `torch.compile` and `torch.export` see an operator for each call of an operation
    (`operators.py`), on a CPU within `dispatch.fused_everywhere()`.

    Returns:
        How many calls of each operation the network has now: `{"gated_linear_unit": 16, "group_norm_silu": 61, ...}`.
    """
    remove(module)
    rules = _rules()
    found = [
        (layer, rule) for layer in module.modules() for rule in rules.get(class_name(layer), ()) if rule.accepts(layer)
    ]
    counts: Counter[str] = Counter()
    for layer, rule in found:
        counts.update(rule.sites(layer))
        _recast(layer, rule.part, partial(_fused, rule.forward))
    return dict(sorted(counts.items()))


def remove(module: nn.Module) -> None:
    """Take out what `apply` put in; the network is then as it was."""
    for layer in module.modules():
        for part in ("", "processor"):
            if _unfused(type(getattr(layer, part, None) if part else layer)):
                _recast(layer, part, _unfused)


def sites(**counts: int) -> Callable[[Any], Sites]:
    """The same sites in every layer."""
    return lambda layer: counts


def holds(**kinds: type | str) -> Callable[[Any], bool]:
    """Whether the attributes of a layer are of exactly these classes, given as such or by module and name."""
    return lambda layer: all(
        kind in (type(part := getattr(layer, name, None)), class_name(part)) for name, kind in kinds.items()
    )


def class_name(value: object) -> str:
    """Module and name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


@cache
def _rules() -> Mapping[str, list[Rule]]:
    """Rules by the class of their layer, which is never imported: a network that has one brings it."""
    from . import rules_attention, rules_embedding, rules_normalisation, rules_sana, rules_transformer, rules_unet

    table: dict[str, list[Rule]] = {}
    families = (rules_attention, rules_embedding, rules_normalisation, rules_sana, rules_transformer, rules_unet)
    for family in families:
        for rule in family.RULES:
            table.setdefault(rule.layer, []).append(rule)
    return table


def _recast(layer: Any, part: str, cast: Callable[[Any], type]) -> None:
    """Give a layer, or its part, the class that `cast` makes of its own."""
    if part == "processor":
        # Networks may share a processor: each gets its own.
        processor = copy.copy(layer.processor)
        processor.__class__ = cast(type(processor))
        layer.set_processor(processor)
    else:
        target = getattr(layer, part) if part else layer
        target.__class__ = cast(type(target))


@cache
def _fused(fused: Callable[..., Any], kind: type) -> type:
    """A subclass that runs `fused` where `runs_fused` says so; of the same name, by which diffusers finds blocks."""
    method = "forward" if issubclass(kind, nn.Module) else "__call__"
    unfused = getattr(kind, method)

    @wraps(unfused)  # attention layers read the signature of their processor
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        operand = next(value for value in (*args, *options.values()) if isinstance(value, Tensor))
        result = fused(self, *args, **options) if dispatch.runs_fused(operand) else NotImplemented
        return unfused(self, *args, **options) if result is NotImplemented else result

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, method: forward, "unfused": kind})


def _unfused(kind: type) -> Any:
    """The class that a fused one was made from, None of any other."""
    return getattr(kind, "unfused", None)
