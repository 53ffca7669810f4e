"""The gate that every export passes before it is kept: built, opened and drawing what torch draws, or refused."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..runtime.engines import Arrays, Engine
from ..runtime.errors import FewstepError, first_line
from ..runtime.files import atomic_path, write_json
from .diagnosis import first_difference
from .differences import END_TO_END, TOLERANCES
from .graph import Graph
from .parity import Failure, ParityReport, Trial
from .pictures import save_side_by_side

REPORT, PICTURES = "parity.json", "pictures.png"


@dataclass(frozen=True)
class Gate:
    """Refuses an engine with a report, `refused/parity.json` with `pictures.png` where it drew any.

    Args:
        target: name of the engine.
        precision: of its arithmetic.
        graphs: what the target is given, by part.
        build: `build(graph, folder)` makes the target's engine of a graph or a part of one.
        refused: the folder of the report, which goes when an engine passes.
    """

    target: str
    precision: str
    graphs: Mapping[str, Graph]
    build: Callable[[Graph, Path], Engine]
    refused: Path

    @contextmanager
    def building(self) -> Iterator[None]:
        """Refuse what cannot be built or opened: libraries raise errors of their own.

        Raises:
            FewstepError: the sentence that goes with the report.
        """
        try:
            yield
        except (FewstepError, OSError):
            raise
        except Exception as error:
            reason = f"what was exported cannot be built or opened: {first_line(error)}"
            broken = [part for part, graph in self.graphs.items() if not self._builds(graph)]
            places = (self._place(part, self.graphs[part].example) for part in broken)
            failure = Failure("build", reason, place=next(filter(None, places), ""))
            self._refuse(ParityReport(self.target, self.precision, 0, {}, TOLERANCES[self.precision], failure=failure))

    def judge(self, report: ParityReport, trial: Trial | None = None) -> ParityReport:
        """Let an engine pass, or find where what differs from torch begins to.

        Args:
            report: of the comparison.
            trial: the batch that shows the failure, if a single one does.

        Raises:
            FewstepError: a part differs by more than the precision allows, or the score falls.
        """
        failure = report.failure
        if failure:
            place = self._place(failure.part, _tensors(trial.inputs.get(failure.part, {}))) if trial else ""
            self._refuse(replace(report, failure=replace(failure, place=place)), trial)
        shutil.rmtree(self.refused, ignore_errors=True)
        with suppress(OSError):  # others may have been refused
            self.refused.parent.rmdir()
        return report

    def _builds(self, graph: Graph) -> bool:
        try:
            with TemporaryDirectory() as folder:
                self.build(graph, Path(folder))
        except Exception:
            return False
        return True

    def _place(self, part: str, inputs: Mapping[str, Tensor]) -> str:
        """Where a graph goes wrong on these inputs; those they lack, such as the guidance, are the example's."""
        if part not in self.graphs:
            return ""
        graph = self.graphs[part]
        batch = len(next(iter(inputs.values())))
        given = {
            name: inputs[name] if name in inputs else value[:1].expand(batch, *value.shape[1:])
            for name, value in graph.example.items()
        }

        def run(part: Graph) -> Arrays:
            arrays = {name: given[name].numpy() for name in part.inputs}
            with TemporaryDirectory() as folder:
                return self.build(part, Path(folder))(**arrays)

        return first_difference(graph, run, given, self.precision)

    def _refuse(self, report: ParityReport, trial: Trial | None = None) -> NoReturn:
        with atomic_path(self.refused) as folder:
            folder.mkdir()
            write_json(folder / REPORT, _json(asdict(report)))
            if trial and END_TO_END in trial.found:
                save_side_by_side(trial.expected[END_TO_END], trial.found[END_TO_END], folder / PICTURES)
        raise FewstepError(_sentence(report, self.refused))


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _json(value: Any) -> Any:
    """The same with null for what is not finite, for which JSON has no number."""
    if isinstance(value, dict):
        return {name: _json(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _sentence(report: ParityReport, folder: Path) -> str:
    failure = report.failure
    assert failure is not None
    case = f"for {failure.case} " if failure.case else ""
    place = f"; the first value to differ is {failure.place}" if failure.place else ""
    remedy = "export it with --precision fp32" if report.precision != "fp32" else "nothing was exported"
    return (
        f"{report.target} in {report.precision} does not draw what torch draws: {case}{failure.reason}{place}: "
        f"{remedy}, see {folder}"
    )
