"""What `fewstep doctor` finds: one sentence each."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a part of the installation is: only `BROKEN` keeps what is installed from working."""

    GOOD = "good"
    ABSENT = "absent"
    CHANGE = "change"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One part of the installation.

    Args:
        subject: its name.
        verdict: how it is.
        sentence: what was found and, unless it is good, what to install or change.
    """

    subject: str
    verdict: Verdict
    sentence: str
