"""`tuned`, in torch only: one trellis through the channels of a model's own basis, 0 to 4 bits in each.

A step of k bits reads its level from the code of that rate; the register runs on from step to step, so the codes of a
vector are one string of bits. All heads' strings of a token lie one after the other, cut evenly among the heads' regions
of a page: heads may have different numbers of bits, regions not. A head whose first vectors lose more in the tuned basis
than in the plain one, at the same number of bits, stays in the plain one for the sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.codebook.basis import MAX_WIDTH, NAMES, Basis
from kvfold.codebook.trellis import CLIP, STATE_BITS, STATES, code
from kvfold.codec.torch_trellis import BLOCK
from kvfold.codec.trellis import FULL, SCALE_BITS, SCALE_CODES
from kvfold.config import MEAN_TOKENS, PAGE_TOKENS, SideSpec
from kvfold.errors import InvalidConfig
from kvfold.packing.layout import Field
from kvfold.rotation.on_torch import Rotation

STARTS = code(2).starts
WINDOW = STATE_BITS + MAX_WIDTH  # bits of the widest step's window
GATE_PAGES = 4  # pages that decide about a head


@dataclass(frozen=True)
class Form:
    """How a head is coded. forward, inverse: float32 [D, D]. weight: float32 [D] of an error's square root. widths: bits of the
    coded channels, in order; channels: which they are, int64; ends: where each one's bits end in the string."""

    forward: Tensor
    inverse: Tensor
    weight: Tensor
    widths: tuple[int, ...]
    channels: Tensor
    ends: Tensor
    tables: Tensor

    @property
    def bits(self) -> int:
        return sum(self.widths)


def _levels(device: torch.device) -> list[Tensor]:
    """Per width from 1 on, the level of every window, in standard deviations: float32 [2^(6 + width)]."""
    books = [code(width) for width in range(1, MAX_WIDTH + 1)]
    return [torch.from_numpy(b.by_window[0]).to(device, torch.float32) * b.step for b in books]


def form(forward: Tensor, inverse: Tensor, weight: Tensor, widths: Tensor) -> Form:
    channels = widths.nonzero()[:, 0]
    kept = [int(w) for w in widths[channels]]
    device = forward.device
    ends = torch.tensor(kept, dtype=torch.int64, device=device).cumsum(0)
    # Windows of all widths are looked up in one table, the widths' own one after the other.
    starts = {w: sum(1 << (STATE_BITS + v) for v in range(1, w)) for w in range(1, MAX_WIDTH + 1)}
    tables = torch.tensor([[starts[w], (1 << (STATE_BITS + w)) - 1] for w in kept], dtype=torch.int64, device=device)
    tables = tables.reshape(-1, 2)
    return Form(forward, inverse, weight, tuple(kept), channels, ends, tables)


def spread(bits: int, dim: int) -> Tensor:
    """`bits` over `dim` channels as evenly as they go, at most MAX_WIDTH in each: uint8 [dim]."""
    at = torch.arange(dim + 1) * bits // dim
    return (at[1:] - at[:-1]).to(torch.uint8)


class Tuned:
    """One side of one layer. State: which heads are in the plain basis, uint8 [H, 1]."""

    def __init__(
        self, spec: SideSpec, dim: int, keys: list[int], basis: Basis, centred: bool, device: torch.device
    ) -> None:
        if basis.forward.shape != (len(keys), dim, dim):
            raise InvalidConfig(
                f"the tuned profile is of {len(basis.forward)} heads and head_dim {basis.forward.shape[-1]}, "
                f"the model has {len(keys)} and {dim}",
                "Tune the model that it is for",
            )
        self.spec, self.dim, self.latent, self.centred = spec, dim, dim, centred
        self.basis = Basis(*(getattr(basis, n).to(device) for n in NAMES))
        self.count = basis.stored_bytes
        self.fields: tuple[Field, ...] = (
            Field("codes", "codes", 8, self.count),
            Field("header", "codes", 8, 1),
            Field("unit", "half", 16, 1, rows=1),
        )
        self.levels = _levels(device)
        self.table = torch.cat(self.levels)
        self.starts = torch.tensor(STARTS, device=device)
        eye = torch.eye(dim, device=device).expand(len(keys), dim, dim)
        turn = Rotation("hadamard", dim, keys, device).forward(eye).mT  # u = turn @ x
        ones = torch.ones(dim, device=device)
        b = self.basis
        self.forms = [
            (
                form(b.forward[h], b.inverse[h], b.weight[h], b.widths[h]),
                form(turn[h], turn[h].mT, ones, spread(int(b.widths[h].sum()), dim).to(device)),
            )
            for h in range(len(keys))
        ]

    # ---- which basis a head is coded in
    def freeze(self, x: Tensor) -> Tensor:
        """x float32 [H, T, D], a sequence's first vectors -> the heads that lose less in the plain basis, uint8 [H, 1]."""
        x = x[:, MEAN_TOKENS : PAGE_TOKENS * GATE_PAGES]  # the first half page has the sinks
        if self.centred:
            halves = x[:, : x.shape[1] // MEAN_TOKENS * MEAN_TOKENS].unflatten(1, (-1, MEAN_TOKENS))
            x = (halves - halves.mean(2, keepdim=True)).flatten(1, 2)
        lost = []
        for h, forms in enumerate(self.forms):
            errors = [x[h] - self._read(f, *self._search(f, x[h])[:2]) @ f.inverse.mT for f in forms]
            lost.append([float((e @ self.basis.cost[h].mT).square().mean()) for e in errors])
        return torch.tensor([[plain < tuned] for tuned, plain in lost], dtype=torch.uint8, device=x.device)

    def _form(self, head: int, state: Tensor | None) -> Form:
        return self.forms[head][0 if state is None else int(state[head, 0])]

    # ---- vectors to bits
    def _search(self, f: Form, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [N, D] -> (windows int64 [N, C], scale float32 [N], first states [N], symbols [N, C]) of coded channels."""
        u = (x @ f.forward.mT)[:, f.channels]
        weight = f.weight[f.channels]
        r = u.square().mean(-1).sqrt()
        u = u / torch.where(r > 0, r, 1.0)[:, None]
        symbols, windows, first = self._viterbi(u.clamp(-CLIP, CLIP), f, weight.square())
        z = self.table[windows + f.tables[:, 0]]
        wu, wz = u * weight, z * weight
        dot, square = (wu * wz).sum(-1), wz.square().sum(-1)
        full = wu.square().sum(-1)
        if self.spec.scale == "norm":
            s = r
        elif self.spec.scale == "unbiased":
            s = r * full / dot
        elif self.spec.scale == "least-squares":
            s = r * dot / square
        else:
            s = r * (full / square).sqrt()
        return windows, torch.where((r > 0) & (dot > 0), s, 0.0), first, symbols

    def _viterbi(self, u: Tensor, f: Form, cost_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The path of least weighted squared error: symbols and windows int64 [N, C], first states int64 [N]."""
        parts = [self._path(block, f, cost_of) for block in u.split(BLOCK)]
        symbols, windows, first = (torch.cat(x) for x in zip(*parts, strict=True))
        return symbols, windows, first

    def _path(self, u: Tensor, f: Form, cost_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, device = len(u), u.device
        cost = torch.full((n, STATES), math.inf, device=device)
        cost[:, self.starts] = 0
        back = torch.empty(len(f.widths), n, STATES, dtype=torch.uint8, device=device)
        for t, width in enumerate(f.widths):
            error = (u[:, t, None] - self.levels[width - 1]).square_().mul_(cost_of[t])
            total = error.unflatten(1, (1 << width, STATES))
            total = total + cost.unflatten(1, (1 << width, -1)).repeat_interleave(1 << width, dim=2)
            cost, origin = total.min(1)
            back[t] = origin
        state = cost.argmin(1)
        windows = torch.empty(n, len(f.widths), dtype=torch.int64, device=device)
        for t in range(len(f.widths) - 1, -1, -1):
            windows[:, t] = back[t].gather(1, state[:, None])[:, 0].long() << STATE_BITS | state
            state = windows[:, t] >> f.widths[t]
        masks = f.tables[:, 1] >> STATE_BITS
        return windows & masks, windows, state

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        return self.encode_under(x, state)

    def encode_under(
        self, x: Tensor, state: Tensor | None, unit: Tensor | None = None, skip: int = 0
    ) -> dict[str, Tensor]:
        """As codec.torch_trellis.Trellis.encode_under."""
        pages, heads, tokens = x.shape[:3]
        strings, scales, firsts = [], [], []
        for h in range(heads):
            f = self._form(h, state)
            _, scale, first, symbols = self._search(f, x[:, h].flatten(0, 1))
            strings.append(_string(symbols, f).unflatten(0, (pages, tokens)))
            scales.append(scale.unflatten(0, (pages, tokens)))
            firsts.append(first.unflatten(0, (pages, tokens)))
        wanted = torch.stack(scales, 1)
        if unit is None:
            counted = wanted.clone()
            counted[0, :, :skip] = 0
            unit = (counted.amax(-1) / FULL)[..., None, None].half()
        scale = torch.where(wanted > 0, (wanted / unit[..., 0].float()).round().clamp_(max=SCALE_CODES - 1), 0.0)
        start = torch.bucketize(torch.stack(firsts, 1), self.starts)
        bits = torch.cat(strings, -1)
        bits = torch.nn.functional.pad(bits, (0, 8 * heads * self.count - bits.shape[-1]))
        place = 1 << torch.arange(7, -1, -1, device=x.device)
        packed = (bits.unflatten(-1, (heads, self.count, 8)) * place).sum(-1).to(torch.uint8)
        broken = ~torch.isfinite(x).all(-1).all(-1)[..., None, None]
        return {
            "codes": packed.transpose(1, 2),
            "header": (scale.to(torch.uint8) | start.to(torch.uint8) << SCALE_BITS)[..., None],
            "unit": unit.masked_fill(broken, torch.inf),
        }

    # ---- bits to vectors
    def _read(self, f: Form, windows: Tensor, scale: Tensor) -> Tensor:
        """z [..., D] of windows [..., C] and scales [...]."""
        z = self.table[windows + f.tables[:, 0]] * scale[..., None]
        out = z.new_zeros(*z.shape[:-1], self.dim)
        out[..., f.channels] = z
        return out

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        codes = planes_of["codes"][0].transpose(1, 2).flatten(-2).int()  # [P, T, H * count]
        header = planes_of["header"][0][..., 0].int()
        unit = planes_of["unit"][0].contiguous().view(torch.float16).float()[..., 0]
        scale = unit * (header & (SCALE_CODES - 1)).float()
        first = self.starts[(header >> SCALE_BITS).long()]
        out, at = [], 0
        for h in range(header.shape[1]):
            f = self._form(h, state)
            out.append(self._read(f, _windows(codes, at, first[:, h], f), scale[:, h]))
            at += f.bits
        return torch.stack(out, 1)

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        return q @ torch.stack([self._form(h, state).inverse for h in range(len(q))])

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        return z @ torch.stack([self._form(h, state).inverse for h in range(len(z))]).mT


def _string(symbols: Tensor, f: Form) -> Tensor:
    """Symbols int64 [N, C] as bits [N, bits], the highest bit of each first."""
    channel = torch.repeat_interleave(torch.arange(len(f.widths)), torch.tensor(f.widths, dtype=torch.int64)).to(
        symbols.device
    )
    place = f.ends[channel] - 1 - torch.arange(f.bits, device=symbols.device)
    return symbols[:, channel] >> place & 1


def _windows(codes: Tensor, at: int, first: Tensor, f: Form) -> Tensor:
    """Windows int64 [P, T, C] of a head whose string begins at bit `at` of codes int32 [P, T, bytes]; first states [P, T]."""
    begin = f.ends + at - WINDOW
    byte = begin >> 3
    word = torch.zeros((), dtype=torch.int32, device=codes.device)
    for j in range(3):
        word = word << 8 | codes.index_select(-1, (byte + j).clamp(0, codes.shape[-1] - 1))
    # Bits before the string are another head's, or none: the start state takes their place.
    own = f.ends.clamp(max=WINDOW)
    window = word >> (24 - WINDOW - (begin & 7)) & ((1 << own) - 1) | first[..., None].int() << own
    return window.long() & f.tables[:, 1]
