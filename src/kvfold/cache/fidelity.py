"""How far folded attention is from exact attention, measured on the way: on a few of the pages as they are folded.

When a page is folded, its tokens are still there exactly and a query is at hand. That costs a page's unfolding and two
decode steps of attention per sample, and nothing where nobody watches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvfold.engine.request import AttendRequest, SequenceView

QUERIES = 8  # newest query tokens of the call that a page is compared under


class Compares(Protocol):
    """What a comparison needs of an engine; see engine.on_torch."""

    def attend(self, request: AttendRequest) -> Tensor: ...

    def unfold(self, rows: Tensor, state: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]: ...


@dataclass
class Fidelity:
    """Sums over the samples of one layer, shared by its forks. every: one page in so many is a sample."""

    every: int
    pages: int = 0
    samples: int = 0
    score_squares: float = 0.0
    output_squares: float = 0.0
    masses: int = 0
    mass: float = 0.0

    def due(self, pages: int) -> bool:
        """Count pages as folded; whether one of them is to be a sample. The first is."""
        before, self.pages = self.pages, self.pages + pages
        return pages > 0 and -(-before // self.every) < -(-self.pages // self.every)

    def compare(self, call: AttendRequest, exact: tuple[Tensor, Tensor], folded: tuple[Tensor, Tensor]) -> None:
        """Attention of one row's queries over one page alone, by its exact and by its folded keys and values [H, 128, D]."""
        heads = exact[0].shape[0]
        rows = call.q[0, :, -QUERIES:].float().unflatten(0, (heads, -1)).flatten(1, 2) * call.scale
        scores, outputs = [], []
        for k, v in (exact, folded):
            s = rows @ k.float().mT
            scores.append(s if call.softcap is None else call.softcap * torch.tanh(s / call.softcap))
            outputs.append(scores[-1].softmax(-1) @ v.float())
        self.samples += 1
        self.score_squares += float((scores[1] - scores[0]).square().mean())
        self.output_squares += float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum())

    def weigh(self, engine: Compares, call: AttendRequest, row: int) -> None:
        """Add how much of the attention that a row's first new token has for tokens falls on folded ones.

        Values of exact tokens are replaced, once by ones and once by zeros: the outputs differ by the exact share.
        """
        view = call.rows[row]
        if not view.folded:
            return
        at = view.pads
        q, k, v = (x[row : row + 1, :, at : at + 1].contiguous() for x in (call.q, call.k, call.v))
        one = replace(call, q=q, k=k, sink_logits=None)
        out = [
            engine.attend(replace(one, v=torch.full_like(v, x), rows=[_with_values(view, x)])).float()
            for x in (0.0, 1.0)
        ]
        self.masses += 1
        self.mass += 1 - float((out[1] - out[0]).mean())

    def report(self) -> dict[str, float | int]:
        """score_error: root mean square, in nats. output_error: root mean square, relative. folded_mass: mean share."""
        if not self.samples:
            return {"samples": 0}
        return {
            "samples": self.samples,
            "score_error": (self.score_squares / self.samples) ** 0.5,
            "output_error": (self.output_squares / self.samples) ** 0.5,
            "folded_mass": self.mass / max(1, self.masses),
        }


def _with_values(view: SequenceView, value: float) -> SequenceView:
    recent, sinks = torch.full_like(view.recent_v, value), torch.full_like(view.sinks_v, value)
    return replace(view, recent_v=recent, sinks_v=sinks, pads=0)
