"""What a request asks of decoding, checked once."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvfold.errors import InvalidConfig
from kvfold.sessions.sampler import Sampler

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Generation:
    """How to continue a prompt. Raises InvalidConfig that names the field.

    max_tokens: at most so many new tokens; None: what context and memory leave. temperature 0 is greedy; top_p, top_k (0: off),
    min_p narrow the draw. Penalties: `repetition` over prompt and answer, `presence` and `frequency` over the answer
    alone, subtracted from logits. logit_bias: token id to what is added to its logit. stop: strings that end the answer and
    are not part of it. seed: of the draws; None draws one. logprobs: how many alternatives to report per token; None
    reports nothing. ignore_end: go on after an end token, for measurements. reuse: go on from what was read before of the
    prompt; False reads all of it again.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_end: bool = False
    reuse: bool = True

    def __post_init__(self) -> None:
        self.sampler()
        finite = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty, *self.logit_bias.values())
        for good, name, range_ in (
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more"),
            (self.repetition_penalty > 0, "repetition_penalty", "more than 0"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "0 to 20"),
            (len(self.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings"),
            (
                all(0 < len(s) <= MAX_STOP_CHARACTERS for s in self.stop),
                "stop",
                f"1 to {MAX_STOP_CHARACTERS} characters",
            ),
            (all(math.isfinite(x) for x in finite), "a penalty or bias", "finite numbers"),
        ):
            if not good:
                raise InvalidConfig(f"{name} is out of range", f"Use {range_}")

    def sampler(self) -> Sampler:
        """A fresh sampler with this seed, or with one drawn now."""
        seed = secrets.randbits(63) if self.seed is None else self.seed & SEED_MASK
        return Sampler(self.temperature, self.top_k, self.top_p, self.min_p, seed)

    @property
    def changes_logits(self) -> bool:
        return bool(self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)
