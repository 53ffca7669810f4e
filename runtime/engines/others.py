"""Whether others keep this machine's processors busy, which spoils what is measured meanwhile."""

import os
from pathlib import Path

DISTURBING = 0.1
"""Share of all processors' time."""


class Others:
    """What other processes take of the processors from when this is made.

    Args:
        file: in which the kernel counts; without it nothing is known.
    """

    def __init__(self, file: Path = Path("/proc/stat")) -> None:
        self._file = file
        self._begin = self._seconds()

    def disturb(self) -> bool:
        """Whether it was more than `DISTURBING` until now; False where nothing is known."""
        whole, used, own = (now - then for now, then in zip(self._seconds(), self._begin, strict=True))
        return used - own > DISTURBING * whole

    def _seconds(self) -> tuple[float, float, float]:
        """Of all processors, of all processes, and of this one; a virtual machine's neighbours are beyond help."""
        if not self._file.is_file():
            return 0.0, 0.0, 0.0
        counts = self._file.read_text(encoding="utf-8").split(maxsplit=9)[1:9]
        user, nice, system, idle, waiting, interrupts, soft, stolen = map(int, counts)
        used, ticks = user + nice + system + interrupts + soft, os.sysconf("SC_CLK_TCK")
        return (used + idle + waiting + stolen) / ticks, used / ticks, sum(os.times()[:4])
