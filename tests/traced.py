"""A student's trajectory, and the graph that is exported of it."""

from pathlib import Path

import torch

from fewstep.export.graph import Graph, trajectory_graph
from fewstep.runtime.families import load_model
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import uniform_times
from fewstep.runtime.trajectory import Trajectory


def trajectory_of(student: Path, steps: int = 1) -> Trajectory:
    """Of as many steps, on the CPU."""
    model = load_model(student, torch.device("cpu"))
    return Trajectory(model, get_sampler("consistency"), uniform_times(steps))


def states_of(batch: int) -> dict[str, torch.Tensor]:
    """What a text encoder would give for as many prompts: the same numbers every time, no token masked."""
    states = torch.randn(batch, 24, 384, generator=torch.Generator().manual_seed(1))
    return {"encoder_hidden_states": states, "encoder_attention_mask": torch.ones(batch, 24, dtype=torch.int64)}


def graph_of(trajectory: Trajectory) -> Graph:
    """Of a batch of any size."""
    config = trajectory.network.config
    return trajectory_graph(trajectory, (config.in_channels, config.sample_size, config.sample_size), states_of(2))
