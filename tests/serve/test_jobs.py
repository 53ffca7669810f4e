"""The queue: turns between users, batches of one kind, and jobs that nobody waits for any more."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fewstep.app.serve.jobs import ExpiredError, FairQueue, Job, User


def job(owner: str, prompt: str = "", steps: int = 1, patience: float = 60.0, user: str = "") -> Job:
    return Job(prompt, 0, steps, None, "", User(owner, user), patience)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await test

    asyncio.run(limited())


def load(queue: FairQueue) -> int:
    """All that waits: what somebody new has ahead of him who asks for more than anybody."""
    return queue.load_ahead(User("new"), 1000)


def prompts(jobs: list[Job]) -> str:
    return "".join(job.prompt for job in jobs)


def test_users_take_turns_and_keep_their_own_order() -> None:
    async def test() -> None:
        queue = FairQueue()
        await queue.put([job("much", prompt) for prompt in "abcd"])
        await queue.put([job("little", "x"), job("little", "y")])
        assert len(queue) == load(queue) == 6
        assert prompts(await queue.take(3, 0)) == "axb"
        assert prompts(await queue.take(8, 0)) == "ycd"
        assert len(queue) == 0

    run(test())


def test_who_names_many_users_gets_no_more_turns() -> None:
    async def test() -> None:
        queue = FairQueue()
        await queue.put([job("many", prompt, user=prompt) for prompt in "aabc"])
        await queue.put([job("one", prompt) for prompt in "xyz"])
        assert prompts(await queue.take(4, 0)) == "axby"
        assert prompts(await queue.take(8, 0)) == "cza"

    run(test())


def test_a_job_waits_for_those_before_its_turn_only() -> None:
    async def test() -> None:
        queue = FairQueue()
        await queue.put([job("much", steps=2) for _ in range(100)])
        await queue.put([job("more", user=str(number)) for number in range(10)])
        assert queue.load_ahead(User("much"), 1) == 200 + 10
        assert queue.load_ahead(User("little"), 1) == 2 + 1
        assert queue.load_ahead(User("little"), 3) == 6 + 3
        assert queue.load_ahead(User("more", "0"), 1) == 10 + 11 * 2
        assert (queue.count("much"), queue.count("little")) == (100, 0)

    run(test())


def test_only_jobs_of_one_kind_are_taken_together() -> None:
    async def test() -> None:
        queue = FairQueue()
        await queue.put([job("one", "a"), job("two", "b", steps=4), job("one", "c"), job("three", "d")])
        assert prompts(await queue.take(8, 0)) == "adc"
        assert load(queue) == 4
        assert prompts(await queue.take(8, 0)) == "b"

    run(test())


def test_one_that_wants_previews_is_drawn_alone() -> None:
    async def test() -> None:
        queue = FairQueue()
        watched = [Job(prompt, 0, 1, None, "", User("one"), 60.0, preview=lambda _: None) for prompt in "ab"]
        await queue.put([*watched, job("one", "c")])
        assert [prompts(await queue.take(8, 0)) for _ in range(3)] == ["a", "b", "c"]

    run(test())


def test_jobs_that_nobody_waits_for_go_and_those_behind_move_up() -> None:
    async def test() -> None:
        queue = FairQueue()
        jobs = [job("one", prompt) for prompt in "abc"]
        await queue.put(jobs)
        queue.discard(jobs[:2])
        assert len(queue) == 1
        assert prompts(await queue.take(8, 0)) == "c"

    run(test())


def test_patience_ends_even_if_no_engine_comes() -> None:
    async def test() -> None:
        queue = FairQueue()
        jobs = [job("one", patience=0.01), job("two", patience=60.0)]
        await queue.put(jobs[:1])
        await queue.put(jobs[1:])
        with pytest.raises(ExpiredError):
            await jobs[0].picture
        assert len(queue) == 1

    run(test())


def test_what_is_put_back_comes_first_again() -> None:
    async def test() -> None:
        queue = FairQueue()
        await queue.put([job("one", prompt) for prompt in "abc"])
        taken = await queue.take(2, 0)
        await queue.put_back(taken)
        assert prompts(await queue.take(3, 0)) == "abc"

    run(test())


def test_a_free_engine_lingers_only_until_the_batch_is_full() -> None:
    async def test() -> None:
        queue = FairQueue()
        await queue.put([job("one", "a")])
        taking = asyncio.create_task(queue.take(2, 60.0))
        await asyncio.sleep(0.01)
        assert not taking.done()
        await queue.put([job("two", "b")])
        assert prompts(await taking) == "ab"

    run(test())


def test_a_lingering_engine_that_gets_no_more_takes_what_it_has() -> None:
    async def test() -> None:
        queue = FairQueue()
        await queue.put([job("one", "a")])
        assert prompts(await queue.take(2, 0.01)) == "a"

    run(test())


def test_an_engine_waits_for_the_first_job() -> None:
    async def test() -> None:
        queue = FairQueue()
        taking = asyncio.create_task(queue.take(2, 0))
        await asyncio.sleep(0.01)
        await queue.put([job("one", "a")])
        assert prompts(await taking) == "a"

    run(test())
