"""`fewstep bench --peers`: ours, on every engine, beside what people use today, each in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import FewstepError
from ...runtime.files import atomic_path, read_json, write_json
from ..machine import machine
from .contender import Contender, our_contenders, peer_contenders, slug
from .engine_table import measured
from .peer_table import add_comparisons, markdown, save_bars
from .subjects import Subject, find_subject, make_model, save_inputs
from .worker import Worker, take_turns

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
WORK = Path("runs/peers")
FEW_ROUNDS = 3
"""Most that one at a time is measured: a call takes seconds, and nothing else runs beside it to be even with."""
AGAIN = ", again"
"""Behind the name of the first contender, where it closes a series: the machine may have changed meanwhile."""


def compare(
    name: str, student: Path, environments: Path, rounds: int, threads: int | None, report: Report
) -> dict[str, Any]:
    """Measure a subject: what was compared, how, where, and a row for each contender.

    Args:
        name: of the subject.
        student: what the subject `student` is made of.
        environments: folder of the peers' environments.
        rounds: measurements of each contender, at most `FEW_ROUNDS` where they are held one at a time.
        threads: of each process; None takes torch's own.
        report: see `Report`.

    Raises:
        FewstepError: an unknown subject, or one that is not a student of one step.
    """
    subject, here = find_subject(name, student), machine()
    rounds, threads = rounds if subject.together else min(rounds, FEW_ROUNDS), threads or here["threads"]
    comparison = Comparison(subject, WORK, environments, rounds, threads)
    report("making the model", 0, 1)
    rows = comparison.measure(comparison.contenders(), report)
    turns = (
        "All contenders are held in memory and take turns in every round"
        if subject.together
        else "Contenders are held in memory one at a time, the first again at the end"
    )
    how = f"{turns}: {rounds} rounds, {threads} {'thread' if threads == 1 else 'threads'} each."
    return {"machine": {**here, "threads": threads}, "note": subject.note, "how": how, "rounds": rounds, "rows": rows}


def save_comparison(name: str, entry: dict[str, Any], out: Path) -> None:
    """Put a subject beside the others of this machine: `<machine>.json`, and `peers.md` and `peers.png` of them all."""
    file = out / f"{slug(entry['machine']['processor'].replace('_', '-'))}.json"
    known = read_json(file) if file.is_file() else {}
    subjects = {**known, name: entry}
    write_json(file, subjects)
    with atomic_path(out / "peers.md") as temporary:
        temporary.write_text(markdown(subjects), encoding="utf-8")
    save_bars(subjects, out / "peers.png")


@dataclass(frozen=True)
class Comparison:
    """What is compared and how.

    Args:
        subject: the student.
        work: folder for models, exports and logs, which the next run takes up.
        environments: folder of the peers' environments.
        rounds: measurements of each contender.
        threads: of each process.
    """

    subject: Subject
    work: Path
    environments: Path
    rounds: int
    threads: int

    def contenders(self) -> list[Contender]:
        """All of ours, then all peers; makes the model and what they draw from.

        Raises:
            FewstepError: the student is not of one step, or its text encoder is missing.
        """
        model, inputs = make_model(self.subject, self.work), self._folder / "inputs.npz"
        save_inputs(self.subject, model, inputs)
        ours = our_contenders(model, self._folder, bare=self.subject.holds_text)
        return [*ours, *peer_contenders(self.subject, model, inputs, self.environments, self.threads)]

    def measure(self, listed: Sequence[Contender], report: Report) -> list[dict[str, Any]]:
        """One row for each contender, for `peer_table.COLUMNS`; whoever fails has a `reason` instead of times."""
        if self.subject.together:
            rows = self._measure(listed, report)
        else:
            rows = [self._recall_or_measure(contender, report) for contender in listed]
            rows += self._measure([listed[0].called(listed[0].name + AGAIN)], report)
        return add_comparisons(rows, self.subject.batches, self._folder)

    def _recall_or_measure(self, contender: Contender, report: Report) -> dict[str, Any]:
        """The row of an earlier run that was interrupted, if it was measured in the same way."""
        file = self._folder / f"{slug(contender.name)}.json"
        circumstances = {"rounds": self.rounds, "threads": self.threads, "job": dict(contender.job)}
        if file.is_file() and (kept := read_json(file))["circumstances"] == circumstances:
            row: dict[str, Any] = kept["row"]
            return row
        row = self._measure([contender], report)[0]
        if "reason" not in row:
            write_json(file, {"circumstances": circumstances, "row": row})
        return row

    def _measure(self, listed: Sequence[Contender], report: Report) -> list[dict[str, Any]]:
        """Hold these in memory at once, opened one after another, and let them take turns."""
        rows, opened = [], []
        batches = self.subject.batches
        with ExitStack() as stack:
            for position, contender in enumerate(listed):
                report(f"opening {contender.name}", position, len(listed))
                row: dict[str, Any] = {"name": contender.name, "ours": contender.ours}
                rows.append(row)
                try:
                    row |= self._export(contender)
                    worker = stack.enter_context(self._start(contender, contender.job))
                    opened.append((worker, self._draw_first(worker), row))
                except FewstepError as error:
                    row["reason"] = str(error)
            what = f"timing {opened[0][0].name}" if len(opened) == 1 else "timing in turns"
            workers = [worker for worker, _, _ in opened]
            take_turns(workers, batches, self.rounds, lambda *done: report(what, *done), self.subject.prompts)
            for worker, first_call_seconds, row in opened:
                row |= measured(worker, first_call_seconds)
                row["seconds"] = {str(batch): worker.seconds[batch] for batch in batches}
        return rows

    def _draw_first(self, worker: Worker) -> float:
        """Seconds of the first call, at the first batch size; keeps the pictures of the last one."""
        seconds = [
            worker.draw(self.subject.prompts(batch, 0), self._pictures(worker)) for batch in self.subject.batches
        ]
        return seconds[0]

    def _export(self, contender: Contender) -> dict[str, float]:
        """Export what a contender needs, once; the seconds that it took."""
        if contender.exported is None:
            return {}
        if not contender.exported.is_file():
            with self._start(contender, {**contender.job, "export": True}) as worker:
                write_json(contender.exported, worker.opened)
        return {"export_seconds": round(read_json(contender.exported)["seconds"], 1)}

    def _start(self, contender: Contender, job: Mapping[str, Any]) -> Worker:
        if contender.program is None:
            raise FewstepError(f"not installed: run `make peers`, or `{contender.installation}`")
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**threads, **contender.environment}
        log = self._folder / f"{slug(contender.name)}{'.export' if job['export'] else ''}.log"
        return Worker(contender.name, contender.program, job, environment, log)

    def _pictures(self, worker: Worker) -> Path:
        return self._folder / f"{slug(worker.name)}.npy"

    @property
    def _folder(self) -> Path:
        return self.work / self.subject.folder
