"""What a request may ask of decoding, and what penalties, biases and log-probabilities are."""

from __future__ import annotations

import math

import pytest
import torch

from kvfold.errors import InvalidConfig
from kvfold.serving.generation import Generation
from kvfold.serving.logits import logprob, process, processors
from kvfold.sessions.sampler import Sampler


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("logit_bias", {3: math.nan}),
        ("stop", ("",)),
        ("stop", ("x" * 300,)),
        ("stop", ("x",) * 17),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_what_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidConfig):
        Generation(**{field: value})


def test_seeds_of_any_sign_are_seeds() -> None:
    assert Generation(seed=-1).sampler().seed == (1 << 63) - 1
    assert Generation(seed=7).sampler().seed == 7
    drawn = {Generation().sampler().seed for _ in range(4)}
    assert len(drawn) == 4


PROMPT, ANSWER, VOCAB = [1, 2, 2], [2, 5, 5, 5], 9


def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))


def processed(**asked: object) -> torch.Tensor:
    return process(processors(Generation(**asked), len(PROMPT)), PROMPT + ANSWER, logits())


def test_without_penalties_logits_stay_as_they_are() -> None:
    before = logits()
    assert process(processors(Generation(), 3), PROMPT, before) is before


def test_answer_penalties_are_openais_formula() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, counts over the answer alone."""
    counts = torch.tensor([0, 0, 1, 0, 0, 3, 0, 0, 0])
    expected = logits() - 0.5 * counts - 1.25 * (counts > 0)
    torch.testing.assert_close(processed(frequency_penalty=0.5, presence_penalty=1.25), expected, rtol=0, atol=1e-6)


def test_repetition_penalty_counts_the_prompt_too() -> None:
    out, before = processed(repetition_penalty=2.0), logits()
    for token in range(VOCAB):
        hit = token in PROMPT + ANSWER
        expected = before[token] * (2.0 if before[token] < 0 else 0.5) if hit else before[token]
        assert float(out[token]) == pytest.approx(float(expected), abs=1e-6)


def test_biases_are_added() -> None:
    out = processed(logit_bias={4: 2.5, 7: -100})
    expected = logits()
    expected[4] += 2.5
    expected[7] -= 100
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_logprobs_are_the_models_own() -> None:
    got = logprob(logits(), 5, 3)
    expected = logits().log_softmax(-1)
    assert got.logprob == pytest.approx(float(expected[5]))
    assert [i for i, _ in got.top] == expected.argsort(descending=True)[:3].tolist()
    assert [p for _, p in got.top] == sorted((p for _, p in got.top), reverse=True)
    assert len(logprob(logits(), 0, 20).top) == VOCAB
    assert logprob(logits(), 0, 0).top == []


def test_extreme_temperatures_and_logits_give_a_token() -> None:
    logits = torch.tensor([1.0, 3.0, -torch.inf, 2.0])
    assert [Sampler(t, top_p=0.5).pick(logits) for t in (5e-324, 1e-30)] == [1, 1]
    assert Sampler(1e300).pick(logits) != 2
    assert Sampler(1.0).pick(torch.tensor([0.0, torch.inf, torch.nan])) == 1
