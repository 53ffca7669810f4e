"""Python and its packages: versions, extras, packages that overwrite each other, and libraries that do not load."""

import importlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from typing import TYPE_CHECKING

from .findings import Finding, Verdict

if TYPE_CHECKING:
    from packaging.markers import Marker

LIBRARIES = ("torch", "triton", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
"""Modules with compiled code, which may be installed and still not load."""
EXCLUSIVE = ("torch", "triton", "onnxruntime", "openvino")
"""Modules that several packages bring, each with files of its own under the same names."""
ALTERNATIVES = {"onnx": "onnx-gpu", "onnx-gpu": "onnx"}
"""Extras of which one is enough."""
_FOR_DEVELOPERS = "dev"


def python() -> Finding:
    """The interpreter's version, and whether the source tree hides packages from it."""
    from packaging.specifiers import SpecifierSet

    version, needed = platform.python_version(), metadata.metadata("fewstep")["Requires-Python"]
    if version not in SpecifierSet(needed, prereleases=True):
        return Finding(
            "python", Verdict.BROKEN, f"Python is {version} and fewstep needs {needed}: make an environment of that"
        )
    found, ours = util.find_spec("kernels"), util.find_spec("fewstep.kernels")
    if found and ours and found.origin == ours.origin:
        sentence = "the folder of fewstep's sources is on sys.path and hides packages: run python -P, clear PYTHONPATH"
        return Finding("python", Verdict.BROKEN, sentence)
    return Finding("python", Verdict.GOOD, f"Python {version}")


def core() -> Finding:
    """What every part of fewstep needs."""
    missing, wrong, right = _requirements("")
    if missing or wrong:
        sentence = f"fewstep {_lack(missing, wrong)}: run pip install --upgrade fewstep"
        return Finding("core", Verdict.BROKEN, sentence)
    return Finding("core", Verdict.GOOD, f"all {len(right)} packages of the core fit")


def extras() -> Iterator[Finding]:
    """Each extra: whole, or what it lacks. What is not there is absent; another version than needed is broken."""
    names = [name for name in metadata.metadata("fewstep").get_all("Provides-Extra", []) if name != _FOR_DEVELOPERS]
    found = {name: _requirements(name) for name in names}
    whole = {name for name, (missing, wrong, _) in found.items() if not missing and not wrong}
    for name, (missing, wrong, right) in found.items():
        subject, command = f"extra {name}", f'pip install "fewstep[{name}]"'
        if name in whole:
            yield Finding(subject, Verdict.GOOD, ", ".join(right))
        elif ALTERNATIVES.get(name) not in whole:
            verdict = Verdict.BROKEN if wrong else Verdict.ABSENT
            yield Finding(subject, verdict, f"it {_lack(missing, wrong)}: {command}")


def overwritten(distributions: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Packages that bring one module twice: whichever came last has written over the other's files.

    Args:
        distributions: what brings each module, as `importlib.metadata.packages_distributions` gives it.
    """
    for module in EXCLUSIVE:
        several = sorted(set(distributions.get(module, ())))
        if len(several) > 1:
            names = " and ".join(several)
            remedy = f"pip uninstall {' '.join(several)}, then install the one that you want"
            yield Finding(module, Verdict.BROKEN, f"{names} overwrite each other's files: {remedy}")


def loading(modules: Sequence[str] = LIBRARIES) -> Iterator[Finding]:
    """Libraries that are installed and fail to load, for want of a shared library for instance."""
    for module in modules:
        if util.find_spec(module) is None:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a library's own start-up raises
            reason = " ".join(str(error).split())
            sentence = f"it is installed and does not load ({reason}): provide what is missing, or install it again"
            yield Finding(module, Verdict.BROKEN, sentence)


def _requirements(extra: str) -> tuple[list[str], list[str], list[str]]:
    """What the core (no name) or an extra needs and is missing, is of another version, and is right."""
    from packaging.requirements import Requirement

    missing, wrong, right = [], [], []
    for line in metadata.requires("fewstep") or ():
        needed = Requirement(line)
        if not _belongs(needed.marker, extra):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            missing.append(needed.name)
            continue
        fits = needed.specifier.contains(version, prereleases=True)
        right.append(f"{needed.name} {version}") if fits else wrong.append(f"{needed.name} {version}")
    return missing, wrong, right


def _belongs(marker: "Marker | None", extra: str) -> bool:
    """Whether a requirement is one of the core's (no name), or of the extra's own."""
    in_core = marker is None or marker.evaluate({"extra": ""})
    return in_core if not extra else not in_core and marker is not None and marker.evaluate({"extra": extra})


def _lack(missing: Sequence[str], wrong: Sequence[str]) -> str:
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    parts += [f"does not take {', '.join(wrong)}"] if wrong else []
    return " and ".join(parts)
