"""The page of the kernels: its tables, and that they show what is committed."""

import shutil
from pathlib import Path

from fewstep.app.kernel_tables import NOT_COMPILED, NOT_MEASURED, main, resource_table, speed_table


def test_the_table_gives_the_fraction_and_the_gain_of_each_gpu() -> None:
    facts = {"operation": "norm", "model": "SDXL", "where": "4 x 8", "microseconds": {"kernel": 2.0, "compiled": 3.0}}
    shares = {"forward": 0.81, "backward": 0.5}
    rows = [{**facts, "pass": way, "fraction_of_ceiling": share} for way, share in shares.items()]
    lines = speed_table({"one": rows, "two": rows[:1]}).splitlines()
    assert lines[0] == "| kernel | shape | one, forward | one, backward | two, forward |"
    assert lines[2] == "| norm | SDXL, 4 x 8 | 81 %, 1.5x | 50 %, 1.5x | 81 %, 1.5x |"
    assert speed_table({}) == NOT_MEASURED


def test_the_table_of_resources_gives_the_most_of_any_gpu_and_dtype() -> None:
    rows = [
        {"kernel": "forward", "registers": 40, "spilled_bytes": 0, "shared_bytes": 8},
        {"kernel": "forward", "registers": 32, "spilled_bytes": 4, "shared_bytes": 8},
    ]
    lines = resource_table({"norm_triton": {"rows": rows}}).splitlines()
    assert lines[2] == "| `norm_triton` | forward | 40 | 4 | 8 |"
    assert resource_table({}) == NOT_COMPILED


def test_the_page_shows_the_committed_numbers(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    page = root / "kernels" / "README.md"
    main(Path(shutil.copy(page, tmp_path)), root / "results")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
