"""What `/metrics` tells Prometheus; a registry of its own, so that several applications can live in one process."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from .worker import Drawn

SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 30, 60,
)  # fmt: skip
"""Bounds of latencies: from a millisecond on, which is where few-step images begin."""
CAUSES = (
    "client_gone", "engine_failed", "invalid_api_key", "invalid_request", "queue_full", "refused", "server_error",
    "waited_too_long",
)  # fmt: skip
"""Of refusals, the usual: counted from zero on, since an alert sees no growth of what was not there."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """All that is measured."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._depth = Gauge(
            "fewstep_queue_images", "Images that wait for an engine.", ["model"], registry=self.registry
        )
        self._waits = self._histogram("fewstep_queue_wait_seconds", "From arrival to an engine.", ["model"])
        self._sizes = Histogram(
            "fewstep_batch_images", "Images drawn together.", ["model"], buckets=SIZES, registry=self.registry
        )
        self._stages = self._histogram("fewstep_stage_seconds", "Of a batch, by stage.", ["model", "engine", "stage"])
        self._images = self._counter("fewstep_images", "Images drawn.", ["model", "engine"])
        self.encoding = self._histogram("fewstep_encoding_seconds", "Of one request's images as PNG.", ["model"])
        self.requests = self._histogram(
            "fewstep_request_seconds", "From a request's first byte to its answer's last.", ["path", "status"]
        )
        self.rejections = self._counter("fewstep_rejections", "Requests not served, by cause.", ["cause"])
        for cause in CAUSES:
            self.rejections.labels(cause)
        self.restarts = self._counter("fewstep_worker_restarts", "Processes that took a dead one's place.", ["model"])
        self.reloads = self._counter("fewstep_reloads", "Models opened anew.", ["model", "outcome"])

    def watch(self, model: str, depth: Callable[[], int]) -> None:
        """Ask for the length of a model's queue whenever the metrics are read; count what is rare from zero on."""
        self._depth.labels(model).set_function(depth)
        self.restarts.labels(model)
        for outcome in ("done", "failed"):
            self.reloads.labels(model, outcome)

    def drawn(self, model: str, drawn: "Drawn", waits: Sequence[float]) -> None:
        """Count a batch."""
        for seconds in waits:
            self._waits.labels(model).observe(seconds)
        self._sizes.labels(model).observe(len(waits))
        self._images.labels(model, drawn.engine).inc(len(waits))
        for stage, seconds in drawn.stages.items():
            self._stages.labels(model, drawn.engine, stage).observe(seconds)

    def _histogram(self, name: str, text: str, labels: list[str]) -> Histogram:
        return Histogram(name, text, labels, buckets=SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)
