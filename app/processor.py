"""The processor, how much of it this process may use, and settings of OpenMP that hurt."""

from collections.abc import Iterator, Mapping

from .findings import Finding, Verdict

ACTIVE = {"OMP_WAIT_POLICY": ("active",), "GOMP_SPINCOUNT": ("infinity", "infinite"), "KMP_BLOCKTIME": ("infinite",)}
"""Settings by which idle threads keep their core."""
BIND = "OMP_PROC_BIND"
THREADS = "OMP_NUM_THREADS"


def instructions() -> Finding:
    """The CPU's instructions for networks."""
    from ..runtime.engines import device

    known = device.instructions()
    fast = [name for name in known if "bf16" in name or "amx" in name or "sve" in name]
    listed = ", ".join(known) or "no vector instructions that are known here"
    if fast:
        return Finding("processor", Verdict.GOOD, f"it has {listed}: export in bf16")
    return Finding("processor", Verdict.ABSENT, f"it has {listed} and no bfloat16: engines compute in fp32")


def threads(environment: Mapping[str, str], processors: int, granted: int) -> Iterator[Finding]:
    """Settings of OpenMP that hurt.

    Args:
        environment: the process's.
        processors: how many this process may run on.
        granted: how many its container gives it time for.
    """
    found = list(_thread_sentences(environment, processors, granted))
    yield from (Finding("threads", Verdict.CHANGE, sentence) for sentence in found)
    if not found:
        yield Finding("threads", Verdict.GOOD, f"time on {granted} processors, and no setting of OpenMP that hurts")


def _thread_sentences(environment: Mapping[str, str], processors: int, granted: int) -> Iterator[str]:
    for name, values in ACTIVE.items():
        if environment.get(name, "").lower() in values:
            yield f"{name}={environment[name]} lets idle threads keep their cores from others: unset it"
    if environment.get(BIND, "false").lower() not in ("false", ""):
        yield f"{BIND}={environment[BIND]} puts the threads of several processes on the same cores: unset it"
    count = environment.get(THREADS, str(processors))
    if not count.isdecimal() or int(count) < 1:
        yield f"{THREADS} is {count!r}, which is no number of threads: set it to {granted}"
    elif int(count) > granted:
        yield f"OpenMP makes {count} threads where there is time on {granted} processors: set {THREADS}={granted}"
    elif int(count) == 1 and granted >= 4:
        yield f"{THREADS}=1 leaves {granted - 1} processors idle: unset it, unless other processes use them"
