"""What operators and clients ask beside images: models, health, readiness and metrics."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from .context import Context, context_of
from .faults import FaultError, documented

router = APIRouter()


class ModelEntry(BaseModel):
    """One model, and what may be asked of it."""

    id: str
    object: str
    created: int
    owned_by: str
    kind: str
    steps: list[int]
    default_steps: int
    size: str
    guidance: tuple[float, float] | None
    edits: bool
    engine: str


class ModelList(BaseModel):
    """All models."""

    object: str
    data: list[ModelEntry]


class State(BaseModel):
    """How the server is."""

    status: str


@router.get("/v1/models", responses=documented(401), summary="The models that are served")
async def models(context: Annotated[Context, Depends(context_of)]) -> ModelList:
    """The first one is what a request without `model` gets."""
    return ModelList(object="list", data=[ModelEntry(**entry) for entry in _entries(context)])


def _entries(context: Context) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "object": "model",
            "created": context.started,
            "owned_by": "fewstep",
            "kind": facts.kind,
            "steps": list(facts.steps),
            "default_steps": facts.default_steps,
            "size": facts.size,
            "guidance": facts.guidance,
            "edits": facts.edits,
            "engine": facts.engine,
        }
        for name, service in context.services.items()
        if (facts := service.facts)
    ]


@router.get("/health", summary="Whether the process lives")
async def health() -> State:
    """Answers as long as the process does."""
    return State(status="ok")


@router.get("/ready", responses=documented(503), summary="Whether every model can draw")
async def ready(context: Annotated[Context, Depends(context_of)]) -> State:
    """For load balancers: no when a model has lost all its processes, and is being opened again."""
    waiting = [name for name, service in context.services.items() if not service.ready]
    if waiting or not context.services:
        raise FaultError(503, "not_ready", f"being opened: {', '.join(waiting)}")
    return State(status="ready")


@router.get("/metrics", summary="Measurements for Prometheus", response_class=Response)
def metrics(context: Annotated[Context, Depends(context_of)]) -> Response:
    """In Prometheus' text format."""
    return Response(generate_latest(context.metrics.registry), media_type=CONTENT_TYPE_LATEST)
