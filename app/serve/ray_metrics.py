"""What a replica measures, through Ray's exporter: every node has one, and a replica's own `/metrics` nobody finds."""

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry

from ...runtime.errors import require

SECONDS = 5.0
"""Between two readings."""


async def publish(registry: CollectorRegistry) -> None:
    """Copy all samples to gauges of Ray for ever: `fewstep_images_total` is `ray_fewstep_images_total` there."""
    gauges: dict[str, Any] = {}
    while True:
        copy(registry, gauges)
        await asyncio.sleep(SECONDS)


def copy(registry: CollectorRegistry, gauges: dict[str, Any]) -> None:
    """Copy the samples once; `gauges` keeps those that were made, by name."""
    metrics = require("ray.serve", "ray").metrics
    for metric in registry.collect():
        for sample in metric.samples:
            if sample.name.endswith("_created"):
                continue
            if sample.name not in gauges:
                gauges[sample.name] = metrics.Gauge(sample.name, metric.documentation, tuple(sample.labels))
            gauges[sample.name].set(sample.value, sample.labels)
