"""`trellis` on any torch device: the canonical encoder of codec.trellis, vectorised over vectors, and whole-tensor decoding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvfold.codebook.trellis import ERROR_TOP, STATE_BITS, STATES, Code, code
from kvfold.codec.canonical import inverse_sqrt
from kvfold.codec.fields import fields
from kvfold.codec.on_torch import half, root, tree_sum
from kvfold.codec.trellis import FULL, METRIC_TOP, RENORMALISE, SCALE_BITS, SCALE_CODES, gains
from kvfold.config import SideSpec
from kvfold.packing.on_torch import unpack
from kvfold.rotation.on_torch import Rotation

Search = Callable[[Tensor, Code], tuple[Tensor, Tensor]]

BLOCK = 1 << 12  # vectors searched at a time: backpointers are 64 bytes per value


def viterbi(x: Tensor, book: Code) -> tuple[Tensor, Tensor]:
    """codec.trellis.viterbi: inputs int32 [N, D] -> (symbols uint8 [N, D], first states uint8 [N])."""
    parts = [_viterbi(block, book) for block in x.split(BLOCK)]
    return torch.cat([s for s, _ in parts]), torch.cat([s for _, s in parts])


def _viterbi(x: Tensor, book: Code) -> tuple[Tensor, Tensor]:
    n, dim = x.shape
    device = x.device
    levels = torch.tensor(book.levels, dtype=torch.int32, device=device) * book.grid
    index = [torch.from_numpy(i).to(device, torch.int64) for i in book.index]
    cost = torch.full((n, STATES), METRIC_TOP, dtype=torch.int32, device=device)
    cost[:, list(book.starts)] = 0
    back = torch.empty(dim, n, STATES, dtype=torch.uint8, device=device)
    for t in range(dim):
        width = book.widths[t % book.period]
        error = (x[:, t, None] - levels).abs_().clamp_(max=ERROR_TOP)
        metric = (error * error) >> book.shift
        branch = metric[:, index[t % book.period]].unflatten(1, (1 << width, STATES))
        old = cost.unflatten(1, (1 << width, -1)).repeat_interleave(1 << width, dim=2)
        best, origin = old[:, 0] + branch[:, 0], back[t].zero_()
        for p in range(1, 1 << width):
            total = old[:, p] + branch[:, p]
            # Sums that saturate are equal, and the lower predecessor keeps a tie.
            origin.masked_fill_(total < best.clamp_(max=METRIC_TOP), p)
            best = torch.minimum(best, total)
        cost = best.clamp_(max=METRIC_TOP)
        if t % RENORMALISE == RENORMALISE - 1:
            cost = cost - cost.amin(1, keepdim=True)
    # argmin does not promise the first of equals.
    state = (cost * STATES + torch.arange(STATES, device=device)).amin(1) % STATES
    symbols = torch.empty(n, dim, dtype=torch.uint8, device=device)
    for t in range(dim - 1, -1, -1):
        width = book.widths[t % book.period]
        symbols[:, t] = state & ((1 << width) - 1)
        origin = back[t].gather(1, state[:, None])[:, 0]
        state = (origin.long() << STATE_BITS | state) >> width
    return symbols, state.to(torch.uint8)


class Trellis:
    """One side of one layer; equations and the canonical order of operations in codec.trellis."""

    def __init__(self, spec: SideSpec, dim: int, keys: list[int], device: torch.device) -> None:
        self.spec, self.dim, self.latent = spec, dim, dim
        self.fields = fields(spec, dim)
        self.book = code(spec.bits, spec.codec)
        self.search: Search = viterbi  # an engine with a faster equal puts it here
        self.rotation = Rotation(spec.rotation, dim, keys, device)
        # Two steps at a time: their widths, and both levels of every window of two steps.
        self.widths = self.book.widths * (2 // self.book.period)
        window = np.arange(1 << (STATE_BITS + sum(self.widths)))
        early, late = self.book.by_window[0], self.book.by_window[-1]
        both = np.stack([early[window >> self.widths[1]], late[window & (len(late) - 1)]], axis=-1)
        self.levels = torch.from_numpy(both.astype(np.float32)).to(device)
        self.starts = torch.tensor(self.book.starts, dtype=torch.uint8, device=device)
        # Divisors are tensors: a Python number would be applied as a multiplication by its reciprocal.
        self.one, self.dims = torch.ones((), device=device), torch.tensor(float(dim), device=device)
        self.full = torch.tensor(float(FULL), device=device)

    def freeze(self, x: Tensor) -> Tensor | None:
        return None

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        return self.encode_under(x)

    def encode_under(self, x: Tensor, unit: Tensor | None = None, skip: int = 0) -> dict[str, Tensor]:
        """Fields of x [P, H, T, D]: in the pages' own units, which leave out the first page's `skip` first vectors, or in
        `unit` float16 [P, H, 1, 1], which a page that is filled up keeps."""
        y = self.rotation.unnormalised(x)
        r = root(tree_sum(y * y) / self.dims)
        u = y * torch.where(r > 0, self.one / r, 0.0)[..., None]
        rms = r * float(inverse_sqrt(self.dim))
        symbols, first, dot, square = self._path(u)
        if self.spec.scale == "norm":
            wanted = rms * float(np.float32(self.book.step))
        elif self.spec.scale == "unbiased":
            wanted = (rms * self.dims) / dot
        elif self.spec.scale == "least-squares":
            wanted = (rms * dot) / square
        else:
            wanted = rms * root(self.dims / square)
        wanted = torch.where(r > 0, wanted, 0.0)
        if unit is None:
            counted = wanted.clone()
            counted[0, :, :skip] = 0
            unit = (counted.amax(-1) / self.full)[..., None, None].half()
        scale = torch.where(wanted > 0, (wanted / unit[..., 0].float()).round().clamp_(max=SCALE_CODES - 1), 0.0)
        scale = scale.to(torch.uint8)
        start = torch.bucketize(first, self.starts, out_int32=True).to(torch.uint8)
        out = {"symbols": symbols[..., :: self.book.period]}
        if self.book.period == 2:
            out["odd_symbols"] = symbols[..., 1::2]
        # A vector without a length shows in the unit, where whoever folds looks for it.
        return {
            **out,
            "header": (scale | start << SCALE_BITS)[..., None],
            "unit": unit.masked_fill(~torch.isfinite(r).all(-1)[..., None, None], torch.inf),
        }

    def _path(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """codec.trellis.Trellis._path for u float32 [..., D]."""
        first, *others = (self._tried(u, float(gain)) for gain in gains(self.book, self.spec.search))
        symbols, states, dot, square = first
        for other in others:
            better = other[2] * other[2] / other[3] > dot * dot / square
            symbols = torch.where(better[..., None], other[0], symbols)
            states = torch.where(better, other[1], states)
            dot, square = torch.where(better, other[2], dot), torch.where(better, other[3], square)
        return symbols, states, dot, square

    def _tried(self, u: Tensor, gain: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (u * gain).round_().clamp_(-self.book.clip, self.book.clip)
        flat, states = self.search(inputs.flatten(0, -2).int(), self.book)
        symbols, first = flat.view(u.shape), states.view(u.shape[:-1])
        levels = self._levels(symbols, first)
        return symbols, first, tree_sum(u * levels), tree_sum(levels * levels)

    def _levels(self, symbols: Tensor, first: Tensor) -> Tensor:
        """Levels float32 [..., D] of symbols uint8 [..., D] and first states uint8 [...]."""
        even, odd = symbols.int().unflatten(-1, (-1, 2)).unbind(-1)
        return self._paired(even << self.widths[1] | odd, first)

    def _paired(self, pairs: Tensor, first: Tensor) -> Tensor:
        """Levels float32 [..., D] of the symbols of two steps together, int32 [..., D / 2]: two levels to a look-up."""
        width = sum(self.widths)
        before = -(-STATE_BITS // width)
        # The start state as the pairs that would have left it in the register.
        state = torch.stack([first.int() >> (width * j) & ((1 << width) - 1) for j in reversed(range(before))], dim=-1)
        stream = torch.cat([state, pairs], dim=-1)
        window = pairs
        for j in range(1, before + 1):
            window = window | stream[..., before - j : stream.shape[-1] - j] << (width * j)
        window = window & ((1 << (STATE_BITS + width)) - 1)
        return self.levels.index_select(0, window.flatten()).view(*pairs.shape[:-1], self.dim)

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        names = ("symbols", "odd_symbols")[: self.book.period]
        count = self.dim // self.book.period
        parts = [unpack(planes_of[name], width, count) for name, width in zip(names, self.book.widths, strict=True)]
        if self.book.period == 1:
            even, odd = parts[0].int().unflatten(-1, (-1, 2)).unbind(-1)
        else:
            even, odd = parts[0].int(), parts[1].int()
        header = planes_of["header"][0][..., 0]
        scale = half(planes_of["unit"])[..., 0] * (header & (SCALE_CODES - 1)).float()
        levels = self._paired(even << self.widths[1] | odd, self.starts[(header >> SCALE_BITS).long()])
        return levels * scale[..., None]

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        return self.rotation.forward(q)

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        return self.rotation.inverse(z)
