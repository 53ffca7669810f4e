"""The OpenAPI document: what this server can do with the models that it has, and nothing else."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from .access import EDITS
from .context import Context
from .worker import Facts


def describe(app: FastAPI, context: Context) -> None:
    """Have the application's document tell of its models."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # such requests are answered 400
            known = {name: context.service(name)[1] for name in context.services}
            app.openapi_schema = narrowed(schema, known) if known else schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def narrowed(schema: dict[str, Any], known: Mapping[str, Facts]) -> dict[str, Any]:
    """A document that names these models, their sizes and step counts; and edits only if one of them can start so."""
    bodies = schema["components"]["schemas"]
    _narrow(bodies["GenerationRequest"]["properties"], known)
    editing = {name: facts for name, facts in known.items() if facts.edits}
    if editing:
        _narrow(bodies["EditRequest"]["properties"], editing)
        _without_null(bodies["EditRequest"]["properties"])
    else:
        del schema["paths"][EDITS], bodies["EditRequest"]
    return schema


def _narrow(fields: dict[str, Any], known: Mapping[str, Facts]) -> None:
    """To what at least one of these models takes."""

    def only(field: str, values: dict[str, Any]) -> None:
        fields[field]["anyOf"][0] = values

    models = known.values()
    only("model", {"type": "string", "enum": list(known)})
    only("size", {"type": "string", "enum": ["auto", *dict.fromkeys(facts.size for facts in models)]})
    if all(facts.steps for facts in models):
        only("num_inference_steps", {"type": "integer", "enum": sorted({n for facts in models for n in facts.steps})})
    if all(facts.kind != "teacher" for facts in models):
        only("negative_prompt", {"type": "string", "maxLength": 0})
    if all(facts.guidance is None for facts in models):
        only("guidance_scale", {"type": "number", "enum": [1]})


def _without_null(fields: dict[str, Any]) -> None:
    """A form has no null: what is not wished is left out."""
    for name, field in fields.items():
        if "anyOf" in field:
            wish, _ = field.pop("anyOf")
            fields[name] = {**wish, **field}
