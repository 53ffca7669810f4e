"""The file of `fewstep serve --ray`: what it may say, and one sentence for what it may not."""

from pathlib import Path

import pytest

from fewstep.runtime.errors import FewstepError

settings = pytest.importorskip("fewstep.app.serve.ray_settings")

TOML = """
wait = 2
linger = 5
[models.quick]
path = "quick"
largest_batch = 4
[models.slow]
path = "/elsewhere/slow"
[replicas]
most = 3
"""
YAML = """
wait: 2
linger: 5
models:
  quick: {path: quick, largest_batch: 4}
  slow: {path: /elsewhere/slow}
replicas: {most: 3}
"""


def write(folder: Path, text: str, name: str = "ray.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_toml_and_yaml_say_the_same(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    read = settings.read_settings(write(tmp_path, TOML))
    assert settings.read_settings(write(tmp_path, YAML, "ray.yaml")) == read
    assert [model.path for model in read.models.values()] == [str(tmp_path / "quick"), "/elsewhere/slow"]
    assert (read.limits.wait_seconds, read.limits.linger_seconds) == (2, 0.005)
    assert (read.replicas.least, read.replicas.most, read.busy) == (1, 3, 16)


@pytest.mark.parametrize(("models", "fit"), [("", True), ("models = 2", True), ("models = 1", False)])
def test_models_fit_into_every_replica_unless_it_is_said_that_fewer_may_be_open(
    models: str, fit: bool, tmp_path: Path
) -> None:
    assert settings.read_settings(write(tmp_path, TOML + models)).all_fit is fit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"ray.toml: models: Field required$"),
        ("models = {}", r"ray.toml: models: .*at least 1 item"),
        ("model = 3", r"ray.toml: models: Field required|ray.toml: model: Extra inputs"),
        (TOML + "\nmost_ = 1", r"ray.toml: replicas.most_: Extra inputs are not permitted$"),
        (TOML + "\nleast = 4", r"ray.toml: replicas: most is 3, but least is 4: most is at least as many$"),
        (TOML + '\ngpus = "one"', r"ray.toml: replicas.gpus: Input should be a valid number$"),
        ('host = "0.0.0.0"' + TOML, r"ray.toml: 0.0.0.0 is reached from other machines: make keys with `fewstep key`"),
        ("port = 0" + TOML, r"ray.toml: port: Input should be greater than or equal to 1$"),
        ("port = ", r"ray.toml is not valid TOML: "),
    ],
)
def test_what_cannot_be_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=message) as caught:
        settings.read_settings(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(FewstepError, match=r"ray.yml is not valid YAML in line 1"):
        settings.read_settings(write(tmp_path, "a: [", "ray.yml"))
    with pytest.raises(FewstepError, match=r"ray.yml: Input should be a valid dictionary"):
        settings.read_settings(write(tmp_path, "- a", "ray.yml"))
    with pytest.raises(FewstepError, match=r"ray.json is neither TOML nor YAML"):
        settings.read_settings(write(tmp_path, "{}", "ray.json"))
    with pytest.raises(FewstepError, match=r"cannot read .*none.toml: No such file"):
        settings.read_settings(tmp_path / "none.toml")
