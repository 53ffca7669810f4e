"""Calls of networks inside a model: watched as they happen, and made again by the names that a graph gives."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..runtime.engines.parts import named_arguments


@dataclass
class Call:
    """The last call of a network.

    Args:
        inputs: its tensors, by the names of the parameters.
        others: its other arguments.
        outputs: what it gave; see `named_outputs`.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watched(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """The last call of each network within the block."""
    calls = {name: Call() for name in networks}

    def watch(name: str, network: nn.Module) -> Any:
        signature = inspect.signature(network.forward)

        def note(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            arguments = named_arguments(signature, *args, **kwargs)
            inputs = {each: value for each, value in arguments.items() if isinstance(value, Tensor)}
            others = {each: value for each, value in arguments.items() if each not in inputs}
            calls[name] = Call(inputs, others, named_outputs(result))

        return network.register_forward_hook(note, with_kwargs=True)

    hooks = [watch(name, network) for name, network in networks.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def named_outputs(result: Any) -> dict[str, Tensor]:
    """Tensors that a network gives, by names or places; each hidden state of a text encoder has a name of its own."""
    if isinstance(result, Tensor):
        return {"0": result}
    named = result.items() if isinstance(result, Mapping) else enumerate(result)
    outputs: dict[str, Tensor] = {}
    for name, value in named:
        if isinstance(value, Tensor):
            outputs[str(name)] = value
        elif value is not None:
            outputs.update({f"{name}.{place}": state for place, state in enumerate(value)})
    return outputs


class Recalled(nn.Module):
    """A network, called by the names of its tensors as in a call before, that gives a tuple of tensors.

    Args:
        network: the network.
        call: gives the other arguments.
        parameters: of the network, by the names of the inputs.
    """

    def __init__(self, network: nn.Module, call: Call, parameters: Mapping[str, str]) -> None:
        super().__init__()
        self.network, self.others, self.names = network, call.others, dict(parameters)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Call it."""
        named = {self.names[name]: value for name, value in inputs.items()}
        return tuple(named_outputs(self.network(**named, **self.others)).values())
