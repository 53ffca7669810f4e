"""Imports go downward only, optional libraries wait until they are needed, and the package is quick to import."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BELOW = {
    "app": {"export", "training", "runtime", "kernels"},
    "export": {"runtime", "kernels"},
    "training": {"runtime", "kernels"},
    "runtime": {"kernels"},
    "kernels": set[str](),
}
LIGHT = {"torch", "numpy", "PIL", "safetensors", "typer", "rich"}
"""The core dependencies that may be imported at the top of a module; diffusers and transformers are core, but slow."""


def module_name(root: Path, file: Path) -> list[str]:
    parts = ["fewstep", *file.relative_to(root).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(root: Path, file: Path, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, list[str]]]:
    """(line, parts of the module's absolute name) of every import among `nodes`."""
    package = module_name(root, file) if file.name == "__init__.py" else module_name(root, file)[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # `from .. import runtime` and `from ..runtime import schedule` may both name a module last.
            yield from ((node.lineno, [*base, alias.name]) for alias in node.names)


def at_module_top(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run when the module is imported, type-checking blocks and functions left out."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            blocks = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
            yield from (inner for block in blocks for inner in at_module_top(block))


@pytest.mark.parametrize("layer", BELOW)
def test_imports_go_downward_only(root: Path, layer: str) -> None:
    wrong = [
        f"{file.relative_to(root)}:{line} imports {'.'.join(name)}"
        for file in sorted((root / layer).rglob("*.py"))
        for line, name in imports(root, file, ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        if name[0] == "fewstep" and set(name[1:2]) & BELOW.keys() - BELOW[layer] - {layer}
    ]
    assert not wrong


@pytest.mark.parametrize("layer", BELOW)
def test_only_light_libraries_are_imported_at_the_top_of_a_module(root: Path, layer: str) -> None:
    # A kernel's source is Triton code from its first line; its dispatch imports that file on CUDA only.
    light = sys.stdlib_module_names | LIGHT | {"fewstep"} | ({"triton"} if layer == "kernels" else set())
    # The commands import the rest of their folders late.
    serving = light | {"fastapi", "starlette", "pydantic", "prometheus_client", "uvicorn"}
    allowed = {root / "app" / "serve": serving, root / "app" / "demo": serving | {"gradio"}}
    wrong = [
        f"{file.relative_to(root)}:{line} imports {name[0]}"
        for file in sorted((root / layer).rglob("*.py"))
        for line, name in imports(root, file, at_module_top(ast.parse(file.read_text(encoding="utf-8")).body))
        if name[0] not in allowed.get(file.parent, light)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fewstep.app.cli", "torch diffusers transformers openvino onnxruntime"),
        ("fewstep.runtime", "torch diffusers transformers openvino onnxruntime"),
        ("fewstep.runtime.pipeline", "diffusers transformers openvino onnxruntime accelerate"),
    ],
)
def test_importing_does_not_load_what_is_not_needed_yet(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("folder", BELOW)
def test_a_bare_folder_says_how_to_import_it(root: Path, folder: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"ImportError: import fewstep.{folder}, not the bare folder {folder}: run python with -P"
    )
