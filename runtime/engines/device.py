"""The machine that an engine, and the times measured with it, hold for."""

import os
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


def usable_processors(groups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """How many processors this process may run on, and how many its container grants time for, rounded up.

    Args:
        groups: where the kernel mounts control groups, version 2.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    file = groups / "cpu.max"
    quota, _, period = file.read_text(encoding="utf-8").partition(" ") if file.is_file() else ("max", "", "")
    return processors, processors if quota == "max" else min(processors, -(-int(quota) // int(period)))


def physical_cores(information: str | None = None) -> int:
    """How many cores the processors belong to that this process may run on; Linux alone says it.

    Args:
        information: what `/proc/cpuinfo` holds, if not this machine's.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for entry in (_cpu_information() if information is None else information).split("\n\n"):
        found = dict(re.findall(r"^(processor|physical id|core id)\s*:\s*(\d+)$", entry, re.MULTILINE))
        if "core id" in found and int(found["processor"]) in usable:
            cores.add((found.get("physical id"), found["core id"]))
    return len(cores) or len(usable)


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of NVIDIA's driver, which says it in this file; empty where there is none."""
    found = re.search(r"\s(\d+\.[\d.]+)\s", file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else ""


def _cpu_information() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.is_file() else ""
