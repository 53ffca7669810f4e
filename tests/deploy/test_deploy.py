"""The files of app/deploy: what they name exists, and what they promise they hold to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "app" / "deploy"
METRIC = re.compile(r"\bfewstep_[a-z_]+")
SUFFIXES = ("_bucket", "_sum", "_count", "_total")


def yaml_of(name: str) -> Any:
    return pytest.importorskip("yaml").safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "fewstep.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = board["panels"]
    return found


def queries() -> list[str]:
    """All that asks Prometheus: the board's panels, and the rules."""
    rules = [rule["expr"] for group in yaml_of("rules.yml")["groups"] for rule in group["rules"]]
    return rules + [target["expr"] for panel in panels() for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """Every sample that a server can export, and its labels."""
    pytest.importorskip("prometheus_client")
    from fewstep.app.serve.metrics import Metrics

    metrics = Metrics()
    samples: dict[str, set[str]] = {}
    for metric in set(metrics.registry._collector_to_names):
        kind, name = metric._type, metric._name  # type: ignore[attr-defined]
        labels = set(metric._labelnames)  # type: ignore[attr-defined]
        endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}[kind]
        samples |= {name + ending: labels | ({"le"} if ending == "_bucket" else set()) for ending in endings}
    return samples


def test_every_query_is_about_what_the_server_exports() -> None:
    known = exported()
    for query in queries():
        names = METRIC.findall(query)
        assert names or query.startswith("up{"), query
        for name in names:
            assert name in known, f"{name} of {query}"
        labels = {label.strip() for names in re.findall(r"by \(([^)]*)\)", query) for label in names.split(",")}
        labels |= {label for name in re.findall(r"{([^}]*)}", query) for label in re.findall(r"(\w+)=", name)}
        assert labels <= {"le", "job"}.union(*(known[name] for name in names)), f"{query} asks for labels nobody has"


def test_the_board_shows_all_that_is_exported() -> None:
    shown = {name for query in queries() for name in METRIC.findall(query)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()}
    assert {family for family in families if not any(name.startswith(family) for name in shown)} == set()


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    places = [panel["gridPos"] for panel in panels()]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_compose_gives_nothing_to_the_network_and_needs_keys() -> None:
    compose = yaml_of("compose.yaml")
    for service in compose["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), volume
    server = compose["services"]["server"]
    assert server["read_only"] is True
    assert [secret["target"] for secret in server["secrets"]] == ["fewstep-keys"]
    assert "/app/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    assert "app/deploy" in (ROOT / ".dockerignore").read_text().splitlines()


def test_prometheus_asks_the_server_where_compose_has_it() -> None:
    compose, prometheus = yaml_of("compose.yaml"), yaml_of("prometheus.yml")
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in compose["services"]
    assert all((DEPLOY / name).is_file() for name in prometheus["rule_files"])
    source = yaml_of("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    used = {panel["datasource"]["uid"] for panel in panels()}
    assert used == {source["uid"]}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_what_an_image_copies_is_there_and_is_sent(name: str) -> None:
    lines = (DEPLOY / name).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in lines:
        words = [word for word in line.split()[1:] if not word.startswith("--")]
        if line.startswith("COPY") and "--from" not in line:
            for source in words[:-1]:
                assert (ROOT / source).exists(), f"{name} copies {source}"
                assert source.split("/")[0] in allowed, f".dockerignore keeps {source} away"
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users, "the server must not be root"
    assert users[-1] != "root"
    assert any("/health" in line for line in lines if line.startswith("HEALTHCHECK"))
    assert any("--constraint constraints.txt" in line for line in lines)


def test_ray_manifests_say_what_the_builder_takes() -> None:
    settings = pytest.importorskip("fewstep.app.serve.ray_settings")
    manifest = yaml_of("rayservice.yaml")
    content = pytest.importorskip("yaml").safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = content["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (ROOT / f"{module.removeprefix('fewstep.').replace('.', '/')}.py").is_file()
    assert name == "application"
    parsed = settings.parse_settings(application["args"], "args", Path("/"))
    assert parsed.keys
    assert parsed.host == content["http_options"]["host"]
    assert parsed.port == content["http_options"]["port"]
    assert settings.read_settings(DEPLOY / "ray.toml").models
