"""`Pipeline`, which the commands and a program of one's own share."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("text")

PROMPTS = ["a red rocket", "a blue crab", "two green leaves"]


@pytest.fixture(scope="module", params=["student", "four_step_student", "teacher"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline.from_pretrained(request.getfixturevalue(request.param), engine="torch", device="cpu")


@pytest.fixture(scope="module")
def one_step(student: Path) -> Pipeline:
    return Pipeline.from_pretrained(student, engine="torch", device="cpu")


def steps_of(pipeline: Pipeline) -> int | None:
    return 4 if pipeline.card.kind == "teacher" else None


def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    one, eight = (
        pipeline.generate(PROMPTS, steps_of(pipeline), seed=3, count=3, batch_size=size).arrays.astype(int)
        for size in (1, 8)
    )
    assert one.shape == (9, 8, 8, 3)
    assert np.abs(one - eight).max() <= 1  # float32 sums differ in order, which may tip a rounding
    assert np.abs(one[0] - one[1]).max() > 1  # another seed
    assert np.abs(one[0] - one[3]).max() > 1  # another prompt


def test_prompts_come_one_after_the_other_each_with_its_seeds(one_step: Pipeline) -> None:
    result = one_step.generate(PROMPTS[:2], seed=10, count=2)
    assert result.prompts == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert result.seeds == [10, 11, 10, 11]
    assert [image.size for image in result.images] == [(8, 8)] * 4
    assert (result.steps, result.engine) == (1, "torch")


def test_seeds_may_be_given_one_an_image(one_step: Pipeline) -> None:
    listed = one_step.generate(PROMPTS[:2], seed=[11, 4])
    for index, seed in enumerate((11, 4)):
        alone = one_step.generate(PROMPTS[index], seed=seed).arrays[0].astype(int)
        assert np.abs(alone - listed.arrays[index].astype(int)).max() <= 1


def test_a_result_says_how_to_make_each_image_again(pipeline: Pipeline) -> None:
    result = pipeline.generate(PROMPTS, steps_of(pipeline), seed=1, count=2)
    again = pipeline.generate(result.prompts, result.steps, seed=result.seeds)
    assert (again.arrays == result.arrays).all()


def test_a_prompt_met_before_is_drawn_the_same_to_the_bit(pipeline: Pipeline) -> None:
    steps = steps_of(pipeline)
    fresh = Pipeline.from_pretrained(pipeline.directory, engine="torch", device="cpu")
    together = fresh.generate(PROMPTS, steps, seed=3).arrays  # none of them met
    alone = fresh.generate(PROMPTS[1], steps, seed=3).arrays  # met in a batch
    again = fresh.generate([*PROMPTS[:2], "a fourth"], steps, seed=3).arrays  # two of them met
    other = Pipeline.from_pretrained(pipeline.directory, engine="torch", device="cpu")
    np.testing.assert_array_equal(other.generate(PROMPTS[1], steps, seed=3).arrays, alone)
    np.testing.assert_array_equal(other.generate([*PROMPTS[:2], "a fourth"], steps, seed=3).arrays, again)
    np.testing.assert_array_equal(other.generate(PROMPTS, steps, seed=3).arrays, together)


def test_the_callback_follows_the_batches(one_step: Pipeline) -> None:
    calls: list[tuple[int, int]] = []
    one_step.generate(PROMPTS[0], count=5, batch_size=2, callback=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_the_time_of_every_stage_is_measured(one_step: Pipeline) -> None:
    result = one_step.generate(PROMPTS[0])
    assert list(result.timings) == ["text", "noise", "network"]
    assert all(seconds > 0 for seconds in result.timings.values())


def test_guidance_changes_what_a_teacher_draws(teacher: Path) -> None:
    pipeline = Pipeline.from_pretrained(teacher, engine="torch", device="cpu")
    plain, default, strong = (
        pipeline.generate(PROMPTS[0], steps=2, guidance=scale).arrays.astype(int) for scale in (1.0, None, 6.0)
    )
    assert np.abs(plain - default).max() > 1
    assert np.abs(default - strong).max() > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": ["a crab", " "]}, "a prompt is empty"),
        ({"count": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"steps": 0}, "0 steps are not possible"),
        ({"steps": 3}, "distilled for 1 step, not for 3: use --steps 1"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**64}, "is out of range"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 images"),
        ({"guidance": 2.0}, "built in: leave both out"),
        ({"sampler": "heun"}, "built in: leave both out"),
    ],
)
def test_what_a_student_cannot_do_is_refused(one_step: Pipeline, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(FewstepError, match=sentence):
        one_step.generate(**{"prompt": "a crab", **arguments})


def test_an_unknown_sampler_is_refused_with_the_known_ones(teacher: Path) -> None:
    with pytest.raises(FewstepError, match=r"there is no sampler 'huen'.*heun"):
        Pipeline.from_pretrained(teacher, engine="torch").generate("a crab", steps=2, sampler="huen")


def test_previews_show_what_each_evaluation_foresees_and_end_in_the_result(teacher: Path) -> None:
    pipeline, seen = Pipeline.from_pretrained(teacher, "torch"), []
    result = pipeline.generate("a square", steps=3, preview=seen.append)
    assert [pixels.shape for pixels in seen] == [result.arrays.shape] * 3
    assert np.array_equal(seen[-1], result.arrays)
    assert not np.array_equal(seen[0], seen[-1])
    assert np.array_equal(pipeline.generate("a square", steps=3).arrays, result.arrays)


def test_a_negative_prompt_leads_away_from_it_where_there_is_guidance(teacher: Path, student: Path) -> None:
    pipeline = Pipeline.from_pretrained(teacher, "torch")
    plain, away = (pipeline.generate("a square", 2, negative_prompt=text).arrays for text in ("", "a circle"))
    assert not np.array_equal(plain, away)
    itself = pipeline.generate("a square", 2, guidance=5.0, negative_prompt="a square").arrays
    assert np.abs(itself.astype(int) - pipeline.generate("a square", 2, guidance=1.0).arrays).max() <= 1
    with pytest.raises(FewstepError, match="a negative prompt needs classifier-free guidance"):
        pipeline.generate("a square", 2, guidance=1.0, negative_prompt="a circle")
    with pytest.raises(FewstepError, match="a negative prompt needs classifier-free guidance"):
        Pipeline.from_pretrained(student, "torch").generate("a square", negative_prompt="a circle")
