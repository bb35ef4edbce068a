"""How a layer's softmax differs from the plain one. Imports nothing, so that a plan can be made without torch."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = "a sliding window"


@dataclass(frozen=True)
class Reach:
    """How far back a query reads: the newest `tokens` tokens, its own included; chunked: back to the last multiple of it."""

    tokens: int
    chunked: bool = False

    def first(self, query: int) -> int:
        """The first token that the query of token `query` reads."""
        return query // self.tokens * self.tokens if self.chunked else max(0, query - self.tokens + 1)


@dataclass(frozen=True)
class Variant:
    """What a layer's scores go through besides their scale.

    softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118); None: they stay. sink_logits: the
    softmax of each query head has one more logit, learned and without a value (gpt-oss, arXiv 2508.10925). latent: of
    multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): what is kept as keys is the latent, which is the value, too;
    what is kept as values is the rotary part of the key. Queries are absorbed: in the width of both. reach: of a sliding or
    chunked layer, where the exact first tokens are no exception; None: queries read everything. expanded: the model computes
    attention itself and is handed decoded keys and values, so that engines fold and decode for it and attend to nothing.
    """

    softcap: float | None = None
    sink_logits: bool = False
    latent: bool = False
    reach: Reach | None = None
    expanded: bool = False

    @property
    def names(self) -> list[str]:
        """What an engine must know to run such a layer; empty for the plain softmax."""
        asked = {
            "softcapped scores": self.softcap,
            "sink logits": self.sink_logits,
            "latent keys": self.latent,
            WINDOW: self.reach,
        }
        return [name for name, wanted in asked.items() if wanted]


PLAIN = Variant()
