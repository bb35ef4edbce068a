"""Decode steps that need nothing of the host, as on a GPU, in a real vLLM: kernels emulated, ids those of planned steps."""

from __future__ import annotations

import functools
from typing import Any

from engines import Run, prompt, run, step

LENGTHS = (1, 70, 120, 128, 250, 517)
PROMPTS = [prompt(i, n) for i, n in enumerate(LENGTHS)]
LAYERS = 6
ANSWER = 40


def through(steps: bool, asked: list[dict[str, Any]], **options: Any) -> Run:
    return run("turbo-3", asked, emulated=steps, dtype="bfloat16", max_model_len=1024, **options)


@functools.cache
def first() -> Run:
    return through(False, [step(*PROMPTS, max_tokens=ANSWER)])


def test_ids_of_planned_steps() -> None:
    """Requests of all lengths through the ends of pages; then others that begin like them."""
    longer = [p + ids for p, ids in zip(PROMPTS, first().ids(0), strict=True)]
    asked = [step(*PROMPTS, max_tokens=ANSWER), step(*longer, max_tokens=ANSWER)]
    planned, alone = through(False, asked), through(True, asked)
    assert [alone.ids(i) for i in range(2)] == [planned.ids(i) for i in range(2)]
    assert max(alone.cached(1)) > 0
    assert planned.launched == 0
    assert alone.launched >= LAYERS * 2 * (ANSWER - 2)


def test_drafts() -> None:
    draft = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    asked = [step(PROMPTS[2] * 2, PROMPTS[2] * 2, max_tokens=ANSWER)]
    planned, alone = (through(steps, asked, speculative_config=draft) for steps in (False, True))
    assert alone.ids(0) == planned.ids(0)
    assert alone.launched > 0


def test_a_prefix_that_another_completes_in_the_same_step() -> None:
    """A request that begins like another comes before, in and after the step that fills the other's page. It must not find that
    page before it is there; the last that does not find it came in the same step."""
    begun = [prompt(10 + i, 120) for i in range(4)]
    answers = through(False, [step(*begun, max_tokens=8)]).ids(0)
    joins = enumerate(zip(begun, answers, strict=True), 6)  # vLLM may schedule a step ahead
    asked = [{**step(p, [*p, *ids, 7], max_tokens=ANSWER), "join": {"1": at}} for at, (p, ids) in joins]
    planned, alone = (through(steps, asked) for steps in (False, True))
    found = [alone.cached(i)[1] for i in range(len(asked))]
    assert found == sorted(found)
    assert set(found) == {0, 128}
    assert [alone.ids(i) for i in range(len(asked))] == [planned.ids(i) for i in range(len(asked))]
