"""What `pip install` gives: every module and nothing else, typed, with the `fewstep` program."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

FOLDERS = ("app", "export", "kernels", "runtime", "training")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def package_files(root: Path) -> set[str]:
    """Names inside the wheel of all files in the package's folders; Markdown and what containers take stay out."""
    files = [file for folder in FOLDERS for file in (root / folder).rglob("*") if file.is_file()]
    out = {"__pycache__", "deploy"}
    packed = [file for file in files if not out.intersection(file.parts) and file.suffix != ".md"]
    names = {file.relative_to(root).as_posix() for file in packed}
    return {f"fewstep/{name.removeprefix('runtime/_root/')}" for name in names}


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # Built from a copy: setuptools leaves a build folder in the source, and would pack what an older one still holds.
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(root / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(root / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = source.glob("fewstep-*.whl")
    return zipfile.ZipFile(file)


def test_every_folder_with_an_init_is_listed_as_a_package(root: Path, project: dict[str, Any]) -> None:
    folders = {
        file.parent.relative_to(root).as_posix() for part in FOLDERS for file in (root / part).rglob("__init__.py")
    }
    expected = {"fewstep." + folder.replace("/", ".") for folder in folders - {"runtime/_root"}} | {"fewstep"}
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(expected)


def test_every_module_lies_in_a_listed_package(root: Path) -> None:
    modules = [file for part in FOLDERS for file in (root / part).rglob("*.py")]
    assert [file for file in modules if not (file.parent / "__init__.py").is_file()] == []


def test_the_wheel_holds_exactly_the_package(wheel: zipfile.ZipFile, root: Path) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == package_files(root)
    assert "fewstep/py.typed" in packed


def test_the_wheel_carries_its_licences(wheel: zipfile.ZipFile, root: Path) -> None:
    for name in ("LICENSE", "NOTICE"):
        (packed,) = (entry for entry in wheel.namelist() if entry.endswith(f"/licenses/{name}"))
        assert wheel.read(packed) == (root / name).read_bytes()


def test_the_console_script_is_installed_and_runs() -> None:
    (entry,) = entry_points(group="console_scripts", name="fewstep")
    assert entry.value == "fewstep.app.cli:main"
    script = Path(sysconfig.get_path("scripts")) / "fewstep"
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_the_version_is_stated_once(project: dict[str, Any]) -> None:
    import fewstep

    assert fewstep.__version__ == project["project"]["version"]
