"""What the OpenAPI document says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from fewstep.app.serve.document import narrowed
from fewstep.app.serve.server import ServerSettings, create_app
from fewstep.app.serve.worker import Facts

from ..served import Server

STUDENT = Facts("student", (1, 2), 1, 8, 8, None, True, "torch", "", "", 0.01)
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def document(**known: Facts) -> dict[str, Any]:
    return narrowed(create_app(ServerSettings({})).openapi(), known)


def test_it_says_what_this_server_has(server: Server, models: dict[str, Path]) -> None:
    found = httpx.get(server.url + "/openapi.json").json()
    fields = found["components"]["schemas"]["GenerationRequest"]["properties"]
    assert fields["model"]["anyOf"][0]["enum"] == list(models)
    assert fields["size"]["anyOf"][0]["enum"] == ["auto", "8x8"]
    for path in (GENERATIONS, EDITS):
        responses = found["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503"}
    assert found["components"]["schemas"]["GenerationRequest"]["additionalProperties"] is False


def test_a_student_alone_is_described_exactly() -> None:
    fields = document(student=STUDENT)["components"]["schemas"]["GenerationRequest"]["properties"]
    assert fields["num_inference_steps"]["anyOf"][0]["enum"] == [1, 2]
    assert fields["negative_prompt"]["anyOf"][0]["maxLength"] == 0
    assert fields["guidance_scale"]["anyOf"][0]["enum"] == [1]


def test_edits_are_a_form_with_a_file_and_without_null() -> None:
    found = document(student=STUDENT, other=replace(STUDENT, edits=False))
    assert list(found["paths"][EDITS]["post"]["requestBody"]["content"]) == ["multipart/form-data"]
    fields = found["components"]["schemas"]["EditRequest"]["properties"]
    assert fields["model"]["enum"] == ["student"]
    assert fields["seed"]["minimum"] == 0
    assert fields["image"]["description"] == "PNG, JPEG or WebP."
    assert "null" not in str(fields)


def test_edits_are_not_there_where_no_model_has_them() -> None:
    found = document(student=replace(STUDENT, edits=False))
    assert EDITS not in found["paths"]
    assert "EditRequest" not in str(found)


def test_models_of_two_kinds_are_described_by_what_either_takes() -> None:
    teacher = replace(STUDENT, kind="teacher", steps=(), guidance=(1.0, 100.0), width=16)
    fields = document(student=STUDENT, teacher=teacher)["components"]["schemas"]["GenerationRequest"]["properties"]
    assert fields["size"]["anyOf"][0]["enum"] == ["auto", "8x8", "16x8"]
    assert fields["num_inference_steps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 100}
    assert fields["negative_prompt"]["anyOf"][0]["maxLength"] > 0
