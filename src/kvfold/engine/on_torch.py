"""Fold, attend and unfold in plain torch: any device, any codec, no compilation. The readable second implementation.

Attention never holds more of the history than one block of pages: peak extra memory is BLOCK_VALUES decoded values
per side, SCORE_VALUES scores, and float32 copies of the call's own queries and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvfold.codec.build import build
from kvfold.codec.on_torch import TorchCodec, tree_sum
from kvfold.codec.torch_trellis import Trellis
from kvfold.codec.torch_tuned import Tuned
from kvfold.config import MEAN_TOKENS, PAGE_TOKENS, CacheSpec
from kvfold.engine.cpu import trellis as native_trellis
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView
from kvfold.errors import NonFiniteInput
from kvfold.packing.layout import MEANS, PageLayout
from kvfold.packing.on_torch import PageCodec

BLOCK_VALUES = 1 << 19  # decoded values of one side at a time: 2 MB of float32, within a core's L2
SCORE_VALUES = 1 << 20  # scores at a time: 4 MB of float32
NEGATIVE = -1e30  # masked scores; finite, so that a fully masked row gives weights that later parts wipe out


def why_not(spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason against this engine for a layer: there is none."""
    return []


def make(spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> TorchEngine:
    """The engine of a layer's kind of attention."""
    kind = LatentEngine if shape.variant.latent else TorchEngine
    return kind(spec, shape, dtype, device)


class TorchEngine:
    """Pages of one layer in canonical byte order."""

    name = "torch"

    def __init__(self, spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.shape, self.device = spec, shape, device
        heads, (dim, value_dim) = shape.kv_heads, shape.dims
        self.key = build(spec.key, spec.seed, shape.layer, 0, shape.heads, dim, spec.centre, dtype, device)
        self.value = build(spec.value, spec.seed, shape.layer, 1, shape.heads, value_dim, False, dtype, device)
        for codec in (self.key, self.value):
            if isinstance(codec, Trellis) and device.type == "cpu" and not native_trellis.missing():
                codec.search = native_trellis.viterbi
        self.layout = PageLayout(self.key.fields, self.value.fields, heads, dim, spec.centre)
        self.pages = PageCodec(self.layout)
        self.page_bytes = self.layout.page_bytes
        per_token = heads * max(self.key.latent, self.value.latent)
        self.block_pages = max(1, BLOCK_VALUES // (per_token * PAGE_TOKENS))
        self.out_dim = value_dim
        self.weighed = self.value.latent  # numbers of a value as pages are summed up

    def running(self) -> dict[str, object]:
        """Threads of the next call; torch may sum in another order with another number of them."""
        return {"threads": torch.get_num_threads(), "bits_depend_on": ["threads"]}

    def freeze(self, keys: Tensor, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What each codec freezes for a sequence, from its first tokens [H, T, D]."""
        return self.key.freeze(keys.float()), self.value.freeze(values.float())

    def fold(
        self, keys: Tensor, values: Tensor, first: bool, out: list[Tensor], state: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Encode whole pages. keys, values [P, H, 128, D]; out: P rows of page_bytes; first: page 0 is among them (at 0).

        Raises NonFiniteInput and leaves `out` as it was if a vector holds NaN or infinity or its scale exceeds float16.
        """
        rows = torch.zeros(len(out), self.page_bytes, dtype=torch.uint8, device=self.device)
        k, v = keys, values
        if self.spec.key.codec != "raw":
            k = k.float()
        if self.spec.value.codec != "raw":
            v = v.float()
        if self.spec.centre:
            codes, scale, means = self.half_means(k, self.spec.sinks if first else 0)
            self.pages.write_means(rows, codes, scale)
            k = k - means.repeat_interleave(MEAN_TOKENS, dim=2)
        for side, codec, x, s in (("key", self.key, k, state[0]), ("value", self.value, v, state[1])):
            self.pages.write(rows, side, self._encode(side, codec, x, s, self.spec.sinks if first else 0))
        for row, target in zip(rows, out, strict=True):
            target.copy_(row)

    def _encode(
        self,
        side: str,
        codec: TorchCodec,
        x: Tensor,
        state: Tensor | None,
        sinks: int = 0,
        unit: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Fields of x. A page's unit of scales, for codecs with one, leaves out the first page's `sinks`, or is the one kept."""
        if isinstance(codec, Tuned):
            encoded = codec.encode_under(x, state, unit, sinks)
        elif isinstance(codec, Trellis):
            encoded = codec.encode_under(x, unit, sinks)
        else:
            encoded = codec.encode(x, state)
        for f in codec.fields:
            if f.kind == "half" and not bool(torch.isfinite(encoded[f.name]).all()):
                raise NonFiniteInput(
                    f"layer {self.shape.layer}: a {side} vector holds NaN or infinity, or is too long for a float16 scale",
                    "Check the model's activations, or use profile 'lossless'",
                )
        return encoded

    def half_means(self, keys: Tensor, first_sinks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean keys of the halves of each page as stored: (codes int8 [P, H, 2, D], scales float16 [P, H, 2], means).

        The first of the pages leaves out its `first_sinks` first tokens. Canonical order: codec.canonical.half_means.
        """
        counts = torch.full((len(keys), 1, MEANS, 1), float(MEAN_TOKENS), device=keys.device)
        if first_sinks:
            keys = keys.clone()
            keys[0, :, :first_sinks] = 0
            counts[0, :, 0] = max(1, MEAN_TOKENS - first_sinks)
            counts[0, :, 1] = min(MEAN_TOKENS, PAGE_TOKENS - first_sinks)
        mean = tree_sum(keys.unflatten(2, (MEANS, MEAN_TOKENS)).mT) / counts
        scale = (mean.abs().amax(-1) / torch.tensor(127.0, device=keys.device)).half()
        s = scale.float()[..., None]
        codes = torch.where(s > 0, mean / s, 0.0).round().clamp(-127, 127)
        return codes.to(torch.int8), scale, s * codes

    def refill(self, row: Tensor, keys: Tensor, values: Tensor, state: tuple[Tensor | None, Tensor | None]) -> None:
        """Write tokens into the tail of a page whose head stays: keys, values [H, n, D] are its last n tokens.

        The page keeps its mean and the codes of its first 128 - n tokens: nothing is encoded twice. Raises as `fold`.
        """
        start = PAGE_TOKENS - keys.shape[1]
        rows = row[None]
        k, v = keys[None], values[None]
        if self.spec.centre:
            k = k.float() - self.pages.read_means(rows).repeat_interleave(MEAN_TOKENS, dim=2)[:, :, start:]
        for side, codec, x, s in (("key", self.key, k, state[0]), ("value", self.value, v, state[1])):
            fields = {f.name: f for f in codec.fields}
            unit = self.pages.read(rows, side, fields["unit"]) if "unit" in fields else None
            encoded = self._encode(side, codec, x if codec.fields[0].kind == "raw" else x.float(), s, unit=unit)
            kept = {}
            for name, f in fields.items():
                kept[name] = self.pages.read(rows, side, f, encoded[name].dtype).clone()
                if f.rows == PAGE_TOKENS:
                    kept[name][:, :, start:] = encoded[name]
            self.pages.write(rows, side, kept)

    def decode(self, rows: Tensor, side: str, state: Tensor | None) -> Tensor:
        """Pages [P, page_bytes] -> z float32 [H, P * 128, latent] of one side."""
        codec: TorchCodec = getattr(self, side)
        z = codec.decode({f.name: self.pages.planes_of(rows, side, f) for f in codec.fields}, state)
        return z.transpose(0, 1).flatten(1, 2)

    def means(self, rows: Tensor) -> Tensor:
        """Mean keys of pages [P, page_bytes], one per half page: float32 [H, P * 2, D]."""
        return self.pages.read_means(rows).transpose(0, 1).flatten(1, 2)

    def unfold(self, rows: Tensor, state: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Pages [P, page_bytes] -> reconstructed keys and values, float32 [H, P * 128, D]."""
        k = self.key.lift(self.decode(rows, "key", state[0]), state[0])
        v = self.value.lift(self.decode(rows, "value", state[1]), state[1])
        if self.spec.centre:
            k = k + self.means(rows).repeat_interleave(MEAN_TOKENS, dim=1)
        return k, v

    def to_canonical(self, row: Tensor) -> Tensor:
        return row

    def from_canonical(self, row: Tensor) -> Tensor:
        return row

    def attend(self, request: AttendRequest) -> Tensor:
        """Softmax attention over pages, sinks, recent and new tokens: [B, H * G, Q, D of values] in the dtype of q."""
        out = request.q.new_zeros(*request.q.shape[:-1], self.out_dim)
        for b, view in enumerate(request.rows):
            p = view.pads
            out[b, :, p:] = self._attend_row(
                request.q[b, :, p:], request.k[b, :, p:], request.v[b, :, p:], request, view
            ).to(out.dtype)
        return out

    def _attend_row(self, q: Tensor, k: Tensor, v: Tensor, call: AttendRequest, view: SequenceView) -> Tensor:
        heads, dim = self.shape.kv_heads, self.out_dim
        new = q.shape[1]
        groups = q.shape[0] // heads
        # Rows are (query token, query of the group), token-major, so that a causal tile is a slice.
        rows = (q.float() * call.scale).unflatten(0, (heads, groups)).transpose(1, 2).flatten(1, 2)
        # Without pages there is nothing to lift, and no codec state to lift it with.
        online = _Online(heads, rows.shape[1], self.weighed if view.runs else dim, q.device)
        online.softcap = call.softcap
        past = view.folded + view.recent_k.shape[1]
        if (reach := self.shape.variant.reach) is not None:
            online.hidden_to = torch.tensor([view.hidden(reach, i) - 1 for i in range(new)], device=q.device)
            online.hidden_to = online.hidden_to.repeat_interleave(groups)
        if view.runs:
            self._pages(online, rows, view)
        sinks = self.spec.sinks if view.folded else 0
        past_k, past_v = self.attended(
            torch.cat([view.sinks_k[:, :sinks], view.recent_k], dim=1).float(),
            torch.cat([view.sinks_v[:, :sinks], view.recent_v], dim=1).float(),
        )
        if past_k.shape[1]:
            tile = max(1, SCORE_VALUES // (heads * past_k.shape[1]))
            t = torch.arange(past - past_k.shape[1], past, device=q.device)
            t[:sinks] = torch.arange(sinks, device=q.device)
            for i in range(0, rows.shape[1], tile):
                at = slice(i, min(i + tile, rows.shape[1]))
                online.block(rows[:, at], past_k, past_v, at=at, mask=online.beyond(t, at))
        tile = max(1, SCORE_VALUES // (heads * groups * min(new, 512)))
        for start in range(0, new, 512):
            stop = min(start + 512, new)
            nk, nv = self.attended(k[:, start:stop].float(), v[:, start:stop].float())
            for i in range(start, new, tile):
                j = min(i + tile, new)
                at = slice(i * groups, j * groups)
                t = torch.arange(start, stop, device=q.device)
                later = t > torch.arange(i, j, device=q.device)[:, None]
                mask = later.repeat_interleave(groups, dim=0) if i < stop else None
                online.block(rows[:, at], nk, nv, at=at, mask=online.beyond(past + t, at, mask))
        if call.sink_logits is not None:
            online.sink(call.sink_logits.float().unflatten(0, (heads, groups)).repeat(1, new))
        o = online.values / online.mass[..., None]
        return o.unflatten(1, (new, groups)).transpose(1, 2).reshape(heads * groups, new, dim)

    @staticmethod
    def attended(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads [H, n, *] of what is kept."""
        return keys, values

    def _absent(self, token: int, n: int, view: SequenceView) -> Tensor | None:
        """Which of n tokens of pages, from `token` on, are not read there [n]; None if all are."""
        if token >= self.spec.sinks and token + n <= view.folded:
            return None
        t = torch.arange(token, token + n, device=self.device)
        return (t < self.spec.sinks) | (t >= view.folded)

    def _pages(self, online: _Online, rows: Tensor, view: SequenceView) -> None:
        """Attend to pages; leaves values in their own basis."""
        zq = self.key.project(rows, view.state_k)
        tile = max(1, SCORE_VALUES // (zq.shape[0] * self.block_pages * PAGE_TOKENS))
        token = 0
        for block in blocks(view.runs, self.block_pages):
            zk = self.decode(block, "key", view.state_k)
            zv = self.decode(block, "value", view.state_v)
            mean = self.means(block) if self.spec.centre else None
            n = len(block) * PAGE_TOKENS
            absent = self._absent(token, n, view)
            if absent is not None:
                # Stale bytes of a trimmed page may decode to anything, and 0 * NaN is NaN.
                zv = zv.masked_fill(absent[:, None], 0.0)
            for i in range(0, rows.shape[1], tile):
                at = slice(i, min(i + tile, rows.shape[1]))
                offset = (rows[:, at] @ mean.mT).repeat_interleave(MEAN_TOKENS, dim=2) if mean is not None else None
                mask = online.beyond(torch.arange(token, token + n, device=self.device), at, absent)
                online.block(zq[:, at], zk, zv, at=at, mask=mask, offset=offset)
            token += n
        online.values = self.value.lift(online.values, view.state_v)


class LatentEngine(TorchEngine):
    """Multi-head latent attention in its absorbed form (see Variant): one latent per token is read as key and as value."""

    def __init__(self, spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(spec, shape, dtype, device)
        self.out_dim = self.weighed = shape.head_dim

    @staticmethod
    def attended(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([keys, values], dim=-1), keys

    def _pages(self, online: _Online, rows: Tensor, view: SequenceView) -> None:
        """Latents are reconstructed a block at a time: their mean is part of the value, so it cannot be left to scores."""
        tile = max(1, SCORE_VALUES // (rows.shape[0] * self.block_pages * PAGE_TOKENS))
        token = 0
        for block in blocks(view.runs, self.block_pages):
            keys, values = self.attended(*self.unfold(block, (view.state_k, view.state_v)))
            n = len(block) * PAGE_TOKENS
            absent = self._absent(token, n, view)
            if absent is not None:
                values = values.masked_fill(absent[:, None], 0.0)
            for i in range(0, rows.shape[1], tile):
                at = slice(i, min(i + tile, rows.shape[1]))
                mask = online.beyond(torch.arange(token, token + n, device=self.device), at, absent)
                online.block(rows[:, at], keys, values, at=at, mask=mask)
            token += n


def blocks(runs: list[Tensor], pages: int) -> Iterator[Tensor]:
    """The pages of `runs`, in order, `pages` at a time [n, page_bytes].

    Where blocks begin depends on the page's number alone, never on where pages happen to lie: sums, and so bits, are the
    same in a fork, a beam or a resumed session. A block over several runs is a copy of its bytes.
    """
    held: list[Tensor] = []
    room = pages
    for run in runs:
        while len(run):
            held.append(run[:room])
            run = run[room:]
            room -= len(held[-1])
            if room == 0:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held, room = [], pages
    if held:
        yield held[0] if len(held) == 1 else torch.cat(held)


class _Online:
    """Running softmax over blocks of keys: maximum, mass and weighted values per row (Milakov and Gimelshein 2018)."""

    def __init__(self, heads: int, rows: int, latent: int, device: torch.device) -> None:
        self.maximum = torch.full((heads, rows), NEGATIVE, device=device)
        self.mass = torch.zeros(heads, rows, device=device)
        self.values = torch.zeros(heads, rows, latent, device=device)
        self.softcap: float | None = None
        self.hidden_to: Tensor | None = None  # with a sliding window: the last token that each row no longer reads

    def beyond(self, tokens: Tensor, at: slice, mask: Tensor | None = None) -> Tensor | None:
        """mask, and which of the tokens at positions [n] lie before the window of the rows `at` [rows, n]."""
        if self.hidden_to is None:
            return mask
        gone = tokens <= self.hidden_to[at, None]
        return gone if mask is None else gone | mask

    def block(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        at: slice = slice(None),
        mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        """Add keys k [H, n, Z] and values v for the rows `at`; mask [rows, n] or [n] True = hidden; offset added to scores."""
        s = q @ k.mT
        if offset is not None:
            s += offset
        if self.softcap is not None:
            s.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask is not None:
            s.masked_fill_(mask, NEGATIVE)
        old = self.maximum[:, at]
        top = torch.maximum(old, s.amax(-1))
        s -= top[..., None]
        s.exp_()
        if mask is not None:
            s.masked_fill_(mask, 0.0)
        shrink = torch.exp(old - top)
        self.maximum[:, at] = top
        self.mass[:, at] = self.mass[:, at] * shrink + s.sum(-1)
        self.values[:, at] = torch.baddbmm(self.values[:, at] * shrink[..., None], s, v)

    def sink(self, logits: Tensor) -> None:
        """Add logits [H, rows] that take weight and give no value."""
        top = torch.maximum(self.maximum, logits)
        shrink = torch.exp(self.maximum - top)
        self.maximum, self.mass = top, self.mass * shrink + torch.exp(logits - top)
        self.values = self.values * shrink[..., None]
