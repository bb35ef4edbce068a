"""The next token from logits. Random numbers are counted, not drawn: the state of a sampler is a few numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import InvalidConfig
from kvfold.rotation.reference import splitmix64, stream


@dataclass
class Sampler:
    """Greedy at temperature 0; else a draw after top_k, top_p and min_p, in that order. 0, 1 and 0 switch those off.

    drawn: tokens picked at random so far. Draw n of a seed is the same number on every machine, whatever else is decoded
    beside it, so a restored session continues as it would have.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    drawn: int = 0

    def __post_init__(self) -> None:
        good = self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1
        if not (good and self.temperature < float("inf") and self.drawn >= 0 and 0 <= self.seed < 1 << 63):
            raise InvalidConfig(
                f"{self} cannot sample",
                "Use temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1 and 0 <= seed < 2**63",
            )

    def pick(self, logits: Tensor) -> int:
        """The next token for logits [V] of any dtype and device; computed in float64 on the CPU."""
        if self.temperature == 0:
            return int(logits.argmax())
        # Penalties can take logits to infinity; relative to the largest they can be divided by any temperature.
        finite = logits.detach().double().cpu().nan_to_num(nan=-torch.inf, posinf=1e300, neginf=-torch.inf)
        scores, order = torch.sort((finite - finite.max()) / self.temperature, descending=True, stable=True)
        if self.top_k:
            scores = scores[: self.top_k]
        p = scores.softmax(-1)
        # The token that reaches top_p is still taken; the most likely one always is.
        kept = ((p.cumsum(-1) - p) < self.top_p) & (p >= self.min_p * p[0])
        p = p[: int(kept.sum())]
        u = (splitmix64(stream(self.seed, self.drawn)) >> 11) * 2.0**-53
        self.drawn += 1
        total = p.cumsum(-1)
        return int(order[min(int((total < u * total[-1]).sum()), len(p) - 1)])

    def state(self) -> dict[str, Any]:
        """Plain numbers; `Sampler(**state)` continues from here."""
        return asdict(self)
