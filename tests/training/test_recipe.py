"""Recipes: what a file says replaces the defaults, and what it says wrongly is named."""

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.runtime.errors import FewstepError
from fewstep.training.methods import METHODS, dmd2, get_method
from fewstep.training.recipe import StudentRecipe, TeacherRecipe, read_recipe

DEFAULT = StudentRecipe(dmd2.Config())


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_file_replaces_what_it_names_at_every_depth(tmp_path: Path) -> None:
    text = "steps: 4\nmethod: {time_range: [0.1, 0.9], guidance: 2}\ntrainer:\n  minutes: 3\n"
    recipe = read_recipe(written(tmp_path, text), DEFAULT)
    method = replace(DEFAULT.method, time_range=(0.1, 0.9), guidance=2.0)
    assert recipe == replace(DEFAULT, steps=4, method=method, trainer=replace(DEFAULT.trainer, minutes=3.0))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, ""), TeacherRecipe()) == TeacherRecipe()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepps: 2", "has no field 'stepps': did you mean steps?"),
        ("method: {guidence: 2}", "method has no field 'guidence': did you mean guidance?"),
        ("guidance: 2", "has no field 'guidance': did you mean method: {guidance: ...}?"),
        ("zebra: 1", "has no field 'zebra': it has method, trainer, steps, batch_size, lora_rank, watchdog"),
        ("steps: many", "steps: 'many' does not fit"),
        ("method: {time_range: [0.1]}", "time_range: "),
        ("trainer: 3", "trainer must be a mapping from names to values, not 3"),
        ("- 1", "must be a mapping from names to values"),
        ("a: [", "cannot read the recipe"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(FewstepError) as caught:
        read_recipe(written(tmp_path, text), DEFAULT)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"cannot read the recipe .*absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml", DEFAULT)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_documents_every_constant(name: str) -> None:
    """The descriptions become the command's help."""
    from dataclasses import fields

    config = get_method(name).Config
    documented = config.__doc__ or ""
    assert [field.name for field in fields(config) if f"\n        {field.name}: " not in documented] == []


def test_unknown_methods_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(FewstepError, match=r"did you mean dmd2\?"):
        get_method("dmd3")
