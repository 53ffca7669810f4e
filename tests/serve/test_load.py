"""The load generator: arrivals, percentiles, and a real server under it."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from statistics import mean, pvariance

import pytest

from fewstep.app.load import Outcome, load, poisson, send, summary
from fewstep.runtime.errors import FewstepError

from ..served import Server

pytest.importorskip("aiohttp")


def options(**changed: object) -> dict[str, object]:
    usual = {"rates": "20", "seconds": 1.0, "images": 1, "trace": None, "model": "", "steps": 0, "key": "", "seed": 0}
    return {**usual, "out": None, **changed}


def test_arrivals_are_a_poisson_process() -> None:
    moments = list(poisson(50, 200, seed=0))
    counts = Counter(int(moment) for moment in moments)
    per_second = [counts[second] for second in range(200)]
    assert mean(per_second) == pytest.approx(50, rel=0.05)
    assert pvariance(per_second) == pytest.approx(50, rel=0.3)  # a Poisson count's variance is its mean
    assert moments == sorted(moments)
    assert moments == list(poisson(50, 200, seed=0))


def test_a_summary_counts_what_was_served_and_what_was_not() -> None:
    outcome = Outcome([0.01 * rank for rank in range(1, 101)], Counter({200: 100, 429: 7, 503: 2, 0: 1}))
    row = summary(outcome, 20.0, images=2, rate=11.0)
    assert (row["requests"], row["served"], row["refused"], row["failed"]) == (110, 100, 7, 3)
    assert row["images_per_second"] == 10.0
    assert (row["p50"], row["p95"], row["p99"]) == (505.0, 950.5, 990.1)
    assert summary(Outcome([], Counter({429: 1})), 1.0, 1, 1.0)["p99"] is None


def test_a_load_is_measured_and_drawn(server: Server, tmp_path: Path) -> None:
    load(server.url, **options(rates="5,10", seconds=2.0, out=tmp_path))  # type: ignore[arg-type]
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    for row in rows:
        assert row["served"] == row["requests"] > 0
        assert row["p50"] <= row["p95"] <= row["p99"]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "load.md").read_text().startswith("| asked, images/s |")


def test_a_trace_is_followed(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace").write_text("0.3\n0.1\n0.1\n")
    load(server.url, **options(trace=tmp_path / "trace", out=tmp_path))  # type: ignore[arg-type]
    assert json.loads((tmp_path / "load.json").read_text())["rows"][0]["served"] == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "no server answers at http://127.0.0.1:1: start one"),
        ("http:///", "no server answers"),
        ("file:///etc", "is no address of a server"),
        ("http://[", "is no address of a server"),
        ("http://127.0.0.1:port", "is no address of a server"),
    ],
)
def test_a_server_that_is_not_there_is_not_measured(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=message):
        load(url, **options(rates="50", seconds=0.2, out=tmp_path / "out"))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_server_that_goes_is_counted_as_such() -> None:
    outcome, _ = asyncio.run(send("http://127.0.0.1:1/v1/images/generations", {}, [0.0, 0.01], ""))
    assert outcome.statuses == {0: 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rates": "fast"}, "--rates is 'fast': give images a second"),
        ({"rates": "0"}, "--rates is '0': give images a second"),
        ({"rates": "0.001", "seconds": 0.1}, "no request falls into that time"),
    ],
)
def test_an_impossible_load_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        load("http://127.0.0.1:1", **options(**changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "soon", "-1", "0\n0", "inf"])
def test_a_trace_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(FewstepError, match="is no trace"):
        load("http://127.0.0.1:1", **options(trace=tmp_path / "trace"))  # type: ignore[arg-type]
