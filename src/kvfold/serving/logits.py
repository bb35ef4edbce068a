"""Penalties, biases and log-probabilities of one request, around the sampler that picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from kvfold.serving.generation import Generation


class AnswerPenalty(LogitsProcessor):
    """Presence and frequency penalties as OpenAI defines them: over the answer's tokens, which start at `prompt`."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, self.prompt :], minlength=scores.shape[-1])[: scores.shape[-1]]
        return scores - self.frequency * counts - self.presence * (counts > 0)


def processors(generation: Generation, prompt: int) -> LogitsProcessorList:
    """What changes the logits of an answer to `prompt` tokens before one is picked."""
    chain = LogitsProcessorList()
    if generation.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(generation.repetition_penalty)))
    if generation.presence_penalty or generation.frequency_penalty:
        chain.append(AnswerPenalty(prompt, generation.presence_penalty, generation.frequency_penalty))
    if generation.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(i,): float(b) for i, b in generation.logit_bias.items()}))
    return chain


def process(chain: LogitsProcessorList, tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Logits [V] after `tokens`, changed by the chain; as they are if it is empty."""
    if not chain:
        return logits
    return chain(torch.tensor([tokens], device=logits.device), logits[None].float())[0]


@dataclass(frozen=True)
class TokenLogprob:
    """A picked token's log-probability under the model itself, and the most likely tokens beside it, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """Of logits [V] before penalties and temperature."""
    scores = logits.float().log_softmax(-1)
    values, ids = scores.topk(min(alternatives, len(scores)))
    return TokenLogprob(token, float(scores[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
