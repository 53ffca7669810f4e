"""What the methods' papers claim, and what a ladder finds."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .tables import Row

TEACHER = "teacher"
"""The teacher with the many steps that it is measured at."""
SOLVERS = "solvers"
"""The best of the teacher's training-free solvers at a step count."""
CLOSE = 0.05
"""Relative difference below which one seed a side decides nothing."""
HIGHER_IS_BETTER = {"fd": False, "diversity": True, "recall": True}


@dataclass(frozen=True)
class Claim:
    """A relation between two rungs, as a paper states it for its own data.

    Args:
        method: whose claim it is.
        text: the claim.
        paper: on arXiv.
        ours: method and steps of the rung that is to be better.
        other: of the rung that it is compared with; its method may be `TEACHER` or `SOLVERS`.
        score: a key of `HIGHER_IS_BETTER`.
    """

    method: str
    text: str
    paper: str
    ours: tuple[str, int]
    other: tuple[str, int]
    score: str = "fd"


REFLOW, HALVING = "rectified-flow", "progressive"
CLAIMS = (
    Claim("dmd2", "1 step at or below the teacher's FID (1.28, 2.35)", "2405.14867", ("dmd2", 1), (TEACHER, 50)),
    Claim("lcm", "2 steps ahead of the teacher's solvers", "2310.04378", ("lcm", 2), (SOLVERS, 2)),
    Claim("lcm", "4 steps ahead of the teacher's solvers", "2310.04378", ("lcm", 4), (SOLVERS, 4)),
    Claim("scott", "1 step ahead of LCM", "2403.01505", ("scott", 1), ("lcm", 1)),
    Claim("scott", "2 steps ahead of LCM", "2403.01505", ("scott", 2), ("lcm", 2)),
    Claim("scott", "more diverse than LCM", "2403.01505", ("scott", 2), ("lcm", 2), "diversity"),
    Claim(REFLOW, "1 step ahead of the teacher's solvers", "2209.03003", (REFLOW, 1), (SOLVERS, 1)),
    Claim(f"{REFLOW}-plus", "1 step ahead of plain reflow", "2405.20320", (f"{REFLOW}-plus", 1), (REFLOW, 1)),
    Claim("consistency", "1 step: 3.55 to progressive's 8.34", "2303.01469", ("consistency", 1), (HALVING, 1)),
    Claim("consistency", "2 steps: 2.93 to progressive's 5.58", "2303.01469", ("consistency", 2), (HALVING, 2)),
    Claim(HALVING, "4 steps ahead of the teacher's solvers", "2202.00512", (HALVING, 4), (SOLVERS, 4)),
)  # fmt: skip
"""Figures in brackets are FIDs of the papers, on CIFAR-10 or, for DMD2, ImageNet-64."""


def checked_claims(entries: Sequence[Row]) -> Iterator[str]:
    """One line of Markdown for each claim whose rungs were climbed: what was found, and whether it agrees.

    Args:
        entries: evaluations, as `training.ladder.climb` returns them.
    """
    for claim in CLAIMS:
        ours, other = (rung_scores(entries, rung, claim.score) for rung in (claim.ours, claim.other))
        if ours and other:
            yield f"- {claim.method}: {claim.text} (arXiv {claim.paper}). {_finding(claim.score, ours, other)}"


def rung_scores(entries: Sequence[Row], rung: tuple[str, int], score: str) -> list[float]:
    """The scores of a rung, one a seed."""
    name, steps = rung
    of_teacher = name in (TEACHER, SOLVERS)
    rungs = (entry for entry in entries if entry["steps"] == steps and entry.get(score) is not None)
    found = [entry[score] for entry in rungs if (entry["kind"] == "teacher" if of_teacher else entry["method"] == name)]
    if name == SOLVERS and found:
        return [max(found) if HIGHER_IS_BETTER[score] else min(found)]
    return found


def _finding(score: str, ours: Sequence[float], other: Sequence[float]) -> str:
    """`Here 12.1 against 13.4: it holds.`, or not, or that more seeds must tell."""
    sign = 1 if HIGHER_IS_BETTER[score] else -1
    means = statistics.mean(ours), statistics.mean(other)
    ahead = sign * (means[0] - means[1]) >= 0
    verdict = "it holds" if ahead else "**it does not hold**"
    if min(len(ours), len(other)) > 1:
        if min(max(ours), max(other)) >= max(min(ours), min(other)):
            verdict = "**too close to tell**, the seeds' ranges overlap"
    elif abs(means[0] - means[1]) < CLOSE * means[1]:
        verdict = f"a close call ({'ahead' if ahead else 'behind'}) that needs more seeds"
    return f"Here {means[0]:.4g} against {means[1]:.4g}: {verdict}."
