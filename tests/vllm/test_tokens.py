"""Profile `lossless` in a real vLLM gives the tokens that vLLM's own cache gives, however requests are cut, shared and mixed."""

from __future__ import annotations

import functools

import pytest
from engines import GPU, PACKED_DTYPE, Run, prompt, run, step

LENGTHS = (70, 128, 300, 517, 800, 1100, 1500, 2100)
PROMPTS = [prompt(i, n) for i, n in enumerate(LENGTHS)]
LONGER = [prompt(i, n + 333) for i, n in enumerate(LENGTHS)]


@functools.cache
def expected() -> tuple[list[list[int]], list[list[int]]]:
    """What vLLM's own cache answers to PROMPTS and to LONGER, one request at a time, nothing shared."""
    steps = [step(p) for p in PROMPTS + LONGER]
    stock = run(None, steps, enable_prefix_caching=False)
    ids = [stock.ids(i)[0] for i in range(len(steps))]
    return ids[: len(PROMPTS)], ids[len(PROMPTS) :]


@functools.cache
def alone() -> Run:
    """Each prompt alone, each again, then prompts that were seen, longer, in one batch with ones that were not."""
    unseen = [prompt(i + 20, n) for i, n in enumerate(LENGTHS[:4])]
    mixed = [p for pair in zip(LONGER[4:], unseen, strict=True) for p in pair]
    return run("lossless", [*(step(p) for p in PROMPTS), *(step(p) for p in PROMPTS), step(*mixed), step(*unseen)])


def test_one_request_at_a_time() -> None:
    assert [alone().ids(i)[0] for i in range(len(PROMPTS))] == expected()[0]


def test_a_prefix_found_in_the_cache() -> None:
    again = range(len(PROMPTS), 2 * len(PROMPTS))
    assert [alone().cached(i)[0] for i in again] == [(n - 1) // 128 * 128 for n in LENGTHS]
    assert [alone().ids(i)[0] for i in again] == expected()[0]


def test_prefixes_found_and_first_chunks_in_one_batch() -> None:
    step = 2 * len(PROMPTS)
    assert [c > 0 for c in alone().cached(step)] == [True, False] * 4
    assert alone().ids(step)[::2] == expected()[1][4:]
    # The prompts among them that were new are asked for again, now with their prefixes in the cache.
    assert alone().ids(step)[1::2] == alone().ids(step + 1)


@pytest.mark.parametrize("tokens", [96, 192])
def test_eight_at_once_in_chunks(tokens: int) -> None:
    """Chunks that end within pages, with decoding requests between them."""
    folded = run("lossless", [step(*PROMPTS), step(*LONGER)], max_num_batched_tokens=tokens, max_num_seqs=16)
    assert (folded.ids(0), folded.ids(1)) == expected()


def test_the_engine_in_a_process_of_its_own() -> None:
    folded = run("lossless", [step(*PROMPTS)], env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert folded.ids(0) == expected()[0]


def test_too_little_memory_for_all_of_them() -> None:
    """Four requests fit when they begin and grow past the memory: some are preempted and computed again.

    vLLM counts the most exact blocks a request could hold before it lets it in, and grows requests into what they leave over,
    so only long answers make it take memory back: each grows by three blocks of pages, to 32 blocks for all with those of
    exact tokens.
    """
    steps = [step(*(prompt(i, 200) for i in range(4)), max_tokens=400, ignore_eos=True)]
    folded = run("lossless", steps, num_gpu_blocks_override=20, max_model_len=1024)
    stock = run(None, steps, max_model_len=1024)
    assert (folded.preempted > 0, stock.preempted) == (True, 0)
    assert folded.ids(0) == stock.ids(0)


def test_requests_given_up() -> None:
    """Two while they are read or just have been, one while it answers; their blocks go to others."""
    given_up = {"2": 4, "7": 4, "5": 20}
    options = {"max_num_batched_tokens": 192, "max_num_seqs": 8, "num_gpu_blocks_override": 80}
    folded = run("lossless", [step(*PROMPTS) | {"abort": given_up}, step(*PROMPTS)], **options)
    others = [i for i in range(len(PROMPTS)) if str(i) not in given_up]
    assert [folded.ids(0)[i] for i in others] == [expected()[0][i] for i in others]
    assert all(len(folded.ids(0)[int(i)]) < len(expected()[0][int(i)]) for i in given_up)
    assert folded.ids(1) == expected()[0]


def test_several_answers_to_a_prompt() -> None:
    """Sampled side by side over one prefix that ends within a page."""
    sampled = [step(PROMPTS[3], n=4, temperature=1.0, seed=3)]
    assert run("lossless", sampled).steps == run(None, sampled).steps


def test_drafts_taken_back() -> None:
    """ngram speculation: several queries a step, and tokens that are taken back."""
    draft = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    folded = run("lossless", [step(*LONGER)], speculative_config=draft)
    assert folded.ids(0) == expected()[1]


def test_heads_split_over_two_workers() -> None:
    folded = run("lossless", [step(*PROMPTS)], tensor_parallel_size=2, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert folded.ids(0) == expected()[0]


def test_which_engine_runs() -> None:
    """The kernels of this machine for packed codes; exact pages have none, so `lossless` runs in torch."""
    assert alone().engines == {"profile lossless, engine torch"}
    two = {"tensor_parallel_size": 2, "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}}
    for profile, options in (("balanced", two), ("compact", {}), ("turbo-3", {}), ("swift-3", {})):
        folded = run(profile, [step(PROMPTS[0], max_tokens=1)], dtype=PACKED_DTYPE, **options)
        assert folded.engines == {f"profile {profile}, engine {'cuda' if GPU else 'cpu'}"}
