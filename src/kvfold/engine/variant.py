"""How a layer's softmax differs from the plain one. Imports nothing, so that a plan can be made without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """What a layer's scores go through besides their scale.

    softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118); None: they stay. sink_logits: the
    softmax of each query head has one more logit, learned and without a value (gpt-oss, arXiv 2508.10925).
    """

    softcap: float | None = None
    sink_logits: bool = False

    @property
    def names(self) -> list[str]:
        """What an engine must know to run such a layer; empty for the plain softmax."""
        return [*(["softcapped scores"] if self.softcap else []), *(["sink logits"] if self.sink_logits else [])]


PLAIN = Variant()
