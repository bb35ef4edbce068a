"""How a layer's softmax differs from the plain one. Imports nothing, so that a plan can be made without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """What a layer's scores go through besides their scale.

    softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118); None: they stay. sink_logits: the
    softmax of each query head has one more logit, learned and without a value (gpt-oss, arXiv 2508.10925). latent: of
    multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): what is kept as keys is the latent, which is the value, too;
    what is kept as values is the rotary part of the key. Queries are absorbed: in the width of both. window: a token at position
    t reads tokens t - window + 1 to t; the exact first tokens are no exception.
    """

    softcap: float | None = None
    sink_logits: bool = False
    latent: bool = False
    window: int | None = None

    @property
    def names(self) -> list[str]:
        """What an engine must know to run such a layer; empty for the plain softmax."""
        asked = {
            "softcapped scores": self.softcap,
            "sink logits": self.sink_logits,
            "latent keys": self.latent,
            "a sliding window": self.window,
        }
        return [name for name, wanted in asked.items() if wanted]


PLAIN = Variant()
