"""The machine that an engine, and the times measured with it, hold for."""

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""What decides on an engine's code on a CPU, as Linux names it."""


@dataclass(frozen=True)
class Device:
    """What computes here.

    Args:
        name: of the processor and, where there is one, of the GPU.
        capability: the GPU's compute capability, such as `9.0`; empty without one.
        driver: version of NVIDIA's driver; empty without one.
    """

    name: str
    capability: str
    driver: str


@cache
def this_device() -> Device:
    """The machine that this runs on."""
    import torch

    capability = ""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        capability = f"{major}.{minor}"
    return Device(processor(), capability, driver_version())


@cache
def processor() -> str:
    """The CPU's name and its instructions among `INSTRUCTIONS`; the GPU's name, where there is one."""
    import torch

    name = re.search(r"^model name\s*:\s*(.+)$", _cpu_information(), re.MULTILINE)
    parts = [name[1].strip() if name else platform.processor() or platform.machine()]
    parts += instructions()
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return " ".join(parts)


@cache
def instructions() -> tuple[str, ...]:
    """Those of `INSTRUCTIONS` that the CPU has."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpu_information(), re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return tuple(instruction for instruction in INSTRUCTIONS if instruction in known)


def computes_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"}.intersection(instructions()))


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of NVIDIA's driver, which says it in this file; empty where there is none."""
    found = re.search(r"\s(\d+\.[\d.]+)\s", file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else ""


def _cpu_information() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.is_file() else ""
