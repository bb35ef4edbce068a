"""One folded attention layer: an engine, a page pool and one sequence per row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kvfold.cache.fidelity import Fidelity
from kvfold.cache.memory import return_large_blocks
from kvfold.cache.pages import PagePool
from kvfold.cache.sequence import Engine, LayerSequence, Staged
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.request import AttendRequest, LayerShape
from kvfold.engine.variant import PLAIN, Variant
from kvfold.errors import (
    CacheMisuse,
    DeviceMismatch,
    DtypeMismatch,
    InvalidInput,
    NonFiniteInput,
    ShapeMismatch,
    Unsupported,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AttendingEngine(Engine, Protocol):
    """An engine that can also attend, and write its pages in the byte order of files."""

    def running(self) -> dict[str, object]: ...

    def to_canonical(self, row: Tensor) -> Tensor: ...

    def from_canonical(self, row: Tensor) -> Tensor: ...

    def attend(self, request: AttendRequest) -> Tensor: ...


Built = tuple[int, int, torch.dtype, torch.device, int]  # KV heads, head_dim, dtype, device, head_dim of values
MakeEngine = Callable[[CacheSpec, LayerShape, torch.dtype, torch.device], AttendingEngine]


class FoldedAttention:
    """Keys and values of one layer for a batch of sequences. Built on its first call, on the device of its first key."""

    def __init__(self, spec: CacheSpec, layer: int, make_engine: MakeEngine, variant: Variant = PLAIN) -> None:
        return_large_blocks()  # before the first call's activations, not after
        self.spec, self.layer, self._make, self.variant = spec, layer, make_engine, variant
        self.engine: AttendingEngine | None = None
        self.sequences: list[LayerSequence] = []
        self._built: Built | None = None
        self.fidelity: Fidelity | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: this layer's own pages, once each, in canonical bytes, which any engine can read."""
        where: dict[int, int] = {}
        canonical: list[Tensor] = []
        for page in (p for s in self.sequences for p in s.pages):
            if page not in where:
                where[page] = len(canonical)
                canonical.append(self.engine.to_canonical(self.pool.row(page)).clone())  # type: ignore[union-attr]
        state = {k: x for k, x in self.__dict__.items() if k not in ("engine", "pool")}
        return {**state, "sequences": [s.detached(where) for s in self.sequences], "canonical": canonical}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sequences, canonical = state.pop("sequences"), state.pop("canonical")
        self.__dict__.update(state, engine=None, sequences=[])
        if self._built is None:
            return
        engine = self._build(self._built)
        pages = [self.pool.allocate() for _ in canonical]
        for page, row in zip(pages, canonical, strict=True):
            self.pool.row(page).copy_(engine.from_canonical(row))
        self.sequences = [LayerSequence.attached(engine, self.pool, s, pages) for s in sequences]
        for page in pages:
            self.pool.release(page)

    def _build(self, built: Built) -> AttendingEngine:
        heads, dim, dtype, device, value_dim = built
        shape = LayerShape(self.layer, heads, dim, dtype.itemsize, variant=self.variant, value_dim=value_dim)
        self.engine = self._make(self.spec, shape, dtype, device)
        self.pool = PagePool(self.engine.page_bytes, device, one_by_one=self.variant.reach is not None)
        self._built = built
        return self.engine

    def _check(self, k: Tensor, v: Tensor) -> None:
        where = f"layer {self.layer}: "
        if k.dim() != 4 or v.dim() != 4 or k.shape[:-1] != v.shape[:-1]:
            raise ShapeMismatch(
                f"{where}keys {tuple(k.shape)} and values {tuple(v.shape)} are not both [batch, heads, tokens, head_dim]",
                "Pass keys and values of one shape, but for head_dim",
            )
        if k.dtype not in DTYPES or k.dtype != v.dtype:
            raise DtypeMismatch(
                f"{where}keys are {k.dtype}, values {v.dtype}", "Pass both as float32, bfloat16 or float16"
            )
        if k.device != v.device:
            raise DeviceMismatch(f"{where}keys are on {k.device}, values on {v.device}", "Move both to one device")

    def _mismatch(self, k: Tensor, v: Tensor) -> InvalidInput | None:
        """Why keys cannot continue the sequences there are, None if they can."""
        where = f"layer {self.layer}: "
        ring, dims = self.sequences[0].ring_k, (self.sequences[0].ring_k.shape[2], self.sequences[0].ring_v.shape[2])
        if len(k) != len(self.sequences) or (k.shape[1], k.shape[3], v.shape[3]) != (ring.shape[0], *dims):
            return ShapeMismatch(
                f"{where}keys {tuple(k.shape)} and values {tuple(v.shape)} do not continue a cache of "
                f"{len(self.sequences)} sequences, {ring.shape[0]} heads and head_dim {dims[0]} and {dims[1]}",
                "Use a new cache, or the batch this one was filled with",
            )
        if k.dtype != ring.dtype:
            return DtypeMismatch(f"{where}keys are {k.dtype}, the cache holds {ring.dtype}", "Use one dtype per cache")
        if k.device != ring.device:
            return DeviceMismatch(
                f"{where}keys are on {k.device}, the cache on {ring.device}", "Use one device per layer"
            )
        return None

    def _check_finite(self, k: Tensor, v: Tensor, pads: Sequence[int]) -> None:
        """Vectors that a fold could not represent are refused when they arrive, not a page later."""
        coded = [(n, x) for n, s, x in (("key", self.spec.key, k), ("value", self.spec.value, v)) if s.codec != "raw"]
        # One answer for both sides: a GPU is waited for once.
        if not coded or bool(torch.stack([torch.isfinite(x).all() for _, x in coded]).all()):
            return
        for side, x in coded:
            for b, p in enumerate(pads):
                if not bool(torch.isfinite(x[b, :, p:]).all()):
                    raise NonFiniteInput(
                        f"layer {self.layer}: a {side} of row {b} holds NaN or infinity",
                        "Check the model's activations, or use profile 'lossless'",
                    )

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Check a call's keys and values [B, H, Q, D] and, on the first one, build engine, pool and sequences."""
        self._check(k, v)
        if self.sequences and (error := self._mismatch(k, v)) is not None:
            if any(s.length for s in self.sequences):
                raise error
            self.clear()
        if self.sequences:
            return
        built = (k.shape[1], k.shape[3], k.dtype, k.device, v.shape[3])
        engine = self.engine if self.engine is not None and self._built == built else self._build(built)
        self.sequences = [LayerSequence(engine, self.pool, k[0], v[0]) for _ in range(len(k))]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pads: Sequence[int],
        scale: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        store: bool = True,
    ) -> Tensor:
        """Attention of a call's queries [B, H * G, Q, D] over the past and the call itself; then append the call.

        softcap, sink_logits [H * G]: as the layer's variant announces; Unsupported otherwise. store: False if others are still
        to attend to the same call.
        """
        self.prepare(k, v)
        call = AttendRequest(q, k, v, scale, [], softcap, sink_logits)
        self.check_variant(call)
        if (
            q.dim() != 4
            or q.shape[1] % k.shape[1]
            or (len(q), *q.shape[2:]) != (len(k), k.shape[2], self._widths(k, v)[0])
        ):
            raise ShapeMismatch(
                f"layer {self.layer}: queries {tuple(q.shape)} do not fit keys {tuple(k.shape)}",
                "Pass [batch, heads * groups, tokens, head_dim]",
            )
        if q.device != k.device:
            raise DeviceMismatch(f"layer {self.layer}: queries are on {q.device}, keys on {k.device}", "Use one device")
        if q.dtype != k.dtype:
            raise DtypeMismatch(f"layer {self.layer}: queries are {q.dtype}, keys {k.dtype}", "Use one dtype")
        self._check_finite(k, v, pads)
        out = self._attend(call, pads)
        if store:
            self._store(k, v, pads, call)
        return out

    def _widths(self, k: Tensor, v: Tensor) -> tuple[int, int]:
        """Numbers of a query and of an output."""
        key, value = k.shape[-1], v.shape[-1]
        return (key + value, key) if self.variant.latent else (key, value)

    def check_variant(self, call: AttendRequest) -> None:
        """Engines were chosen by what the layer announced: a call that asks for more is refused, never answered wrongly."""
        wrong = "softcap" if call.softcap is not None and call.softcap != self.variant.softcap else ""
        if call.sink_logits is not None and not self.variant.sink_logits:
            wrong = "sink logits (s_aux)"
        if wrong:
            raise Unsupported(f"layer {self.layer}: its config announces no such {wrong}", "Use the stock cache for it")

    def _attend(self, call: AttendRequest, pads: Sequence[int]) -> Tensor:
        """Engines are only given rows that have a token in the call; the others are zero."""
        rows = [s.view(p) for s, p in zip(self.sequences, pads, strict=True)]
        some = [b for b, p in enumerate(pads) if p < call.k.shape[2]]
        if len(some) < len(rows):
            out = call.q.new_zeros(*call.q.shape[:-1], self._widths(call.k, call.v)[1])
            if some:
                part = replace(call, q=call.q[some], k=call.k[some], v=call.v[some], rows=[rows[b] for b in some])
                out[some] = self.engine.attend(part)  # type: ignore[union-attr]
            return out
        return self.engine.attend(replace(call, rows=rows))  # type: ignore[union-attr]

    def advance(self) -> None:
        """Count one token in every row, which a kernel has put into the rings. Folds nothing: see `fold_due`."""
        for s in self.sequences:
            s.advance()

    def fold_due(self) -> None:
        """Fold the pages that have left the window. If a row fails, all stay as they are and it is still due."""
        if any(s.due for s in self.sequences):
            k, v = (
                x[None, :, :0].expand(len(self.sequences), -1, -1, -1)
                for x in (self.sequences[0].ring_k, self.sequences[0].ring_v)
            )
            self._store(k, v, [0] * len(self.sequences))

    def append(self, k: Tensor, v: Tensor, pads: Sequence[int]) -> None:
        """Append without attention, as a session being filled does. If a row fails, no row keeps the call's tokens."""
        self.prepare(k, v)
        self._check_finite(k, v, pads)
        self._store(k, v, pads)

    def take(self, k: Tensor, v: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Append k, v [B, H, Q, D]; returns those of all tokens [B, H, columns + Q, D], decoded where folded, zeros first."""
        self.prepare(k, v)
        all_k, all_v = (torch.cat([x.new_zeros(*x.shape[:2], columns, x.shape[3]), x], dim=2) for x in (k, v))
        for b, s in enumerate(self.sequences):
            s.expand(*(x[b, :, columns - s.length : columns] for x in (all_k, all_v)))
        self.append(k, v, [0] * len(k))
        return all_k, all_v

    def _store(self, k: Tensor, v: Tensor, pads: Sequence[int], call: AttendRequest | None = None) -> None:
        staged = []
        rows = [(s, k[b, :, p:], v[b, :, p:]) for b, (s, p) in enumerate(zip(self.sequences, pads, strict=True))]
        try:
            for s, new_k, new_v in rows:
                staged.append(s.stage(new_k, new_v))
        except BaseException:
            for (s, _, _), done in zip(rows, staged, strict=False):
                s.discard(done)
            raise
        if self.fidelity is not None and call is not None:
            self._sample(self.fidelity, call, pads, staged)
        for (s, new_k, new_v), done in zip(rows, staged, strict=True):
            s.commit(done, new_k, new_v)

    def _sample(self, fidelity: Fidelity, call: AttendRequest, pads: Sequence[int], staged: Sequence[Staged]) -> None:
        """Compare the last page that a row of the call folds, if one is due. Rows are still as they were before it."""
        for b, (s, done, p) in enumerate(zip(self.sequences, staged, pads, strict=True)):
            page = done.keep + len(done.new) - 1
            # Of a page that is filled up after a trim, the first tokens are not there exactly.
            if page * PAGE_TOKENS >= s.folded and fidelity.due(len(done.new)):
                exact = s.tokens_of_page(page, call.k[b, :, p:], call.v[b, :, p:])
                folded = self.engine.unfold(s.pool.row(done.new[-1])[None], done.state)  # type: ignore[union-attr]
                fidelity.compare(replace(call, q=call.q[b : b + 1, :, p:]), exact, folded)
                rows = [x.view(pad) for x, pad in zip(self.sequences, pads, strict=True)]
                fidelity.weigh(self.engine, replace(call, rows=rows), b)  # type: ignore[arg-type]

    def trim(self, tokens: Sequence[int]) -> None:
        """Forget the newest tokens of each sequence."""
        for s, n in zip(self.sequences, tokens, strict=True):
            s.trim(n)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat or permute sequences: row i becomes a continuation of old row rows[i]."""
        if not self.sequences:
            return
        taken: set[int] = set()
        chosen = []
        for r in rows:
            chosen.append(self.sequences[r].fork() if r in taken else self.sequences[r])
            taken.add(r)
        for r, s in enumerate(self.sequences):
            if r not in taken:
                s.release()
        self.sequences = chosen

    @staticmethod
    def gather(layers: Sequence[FoldedAttention]) -> FoldedAttention:
        """A layer whose rows are the rows of all `layers`: the same sequences, so what it appends or trims they have, too.

        Raises CacheMisuse if the layers differ in spec, engine, shape, dtype or device, or hold no tokens.
        """
        first = layers[0]
        kinds = {(x.spec, x._built, x.engine.name if x.engine is not None else None) for x in layers}
        if len(kinds) > 1 or first._built is None or not all(x.sequences for x in layers):
            raise CacheMisuse(
                f"layer {first.layer}: caches of different kinds, or empty ones, cannot be one batch",
                "Prefill each, and use one model and one profile",
            )
        return first._with([s for x in layers for s in x.sequences])

    def fork(self) -> FoldedAttention:
        """An independent continuation of every sequence; pages stay shared until one side folds anew."""
        return self._with([s.fork() for s in self.sequences])

    def compact(self) -> FoldedAttention:
        """A fork to be kept and forked again, not continued, with the least exact tokens."""
        return self._with([s.compact() for s in self.sequences])

    def _with(self, sequences: list[LayerSequence]) -> FoldedAttention:
        other = FoldedAttention(self.spec, self.layer, self._make, self.variant)
        other.__dict__.update(self.__dict__)
        other.sequences = sequences
        return other

    def clear(self) -> None:
        """Forget every sequence; the next call may bring another batch, shape, dtype or device."""
        for s in self.sequences:
            s.release()
        self.sequences = []

    @property
    def exact_bytes(self) -> int:
        """Rings, sinks and frozen codec state, each storage once: forks share the state."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for s in self.sequences for t in s.tensors}
        return sum(s.nbytes() for s in storages.values())

    @property
    def shape(self) -> tuple[int, int, torch.dtype, torch.device]:
        """KV heads, head_dim of keys, dtype and device. Raises CacheMisuse before the first call."""
        if self._built is None:
            raise CacheMisuse(f"layer {self.layer} has not been used yet", "Run a call with this cache first")
        return self._built[:4]

    @property
    def value_dim(self) -> int:
        """head_dim of values. Raises CacheMisuse before the first call."""
        return self._built[4] if self._built is not None else self.shape[1]

    @property
    def canonical_page_bytes(self) -> int:
        """Size of a page in files."""
        empty = torch.zeros(self.pool.page_bytes, dtype=torch.uint8, device=self.shape[-1])
        return len(self.engine.to_canonical(empty))  # type: ignore[union-attr]

    def canonical(self, page: int) -> Tensor:
        """A page of the pool in the byte order of files, uint8 on the CPU."""
        return self.engine.to_canonical(self.pool.row(page)).cpu()  # type: ignore[union-attr]

    def adopt(self, canonical: Tensor, digest: bytes | None = None) -> int:
        """A page of the pool with the content of a file's page, with a digest shared with others of the same content."""
        page = self.pool.allocate()
        try:
            row = self.pool.row(page)
            row.copy_(self.engine.from_canonical(canonical.to(row.device)))  # type: ignore[union-attr]
        except BaseException:
            self.pool.release(page)
            raise
        return page if digest is None else self.pool.share(page, digest)

    @property
    def _pools(self) -> list[PagePool]:
        """The pools its pages lie in: its own, and in a gathered layer those of its rows."""
        return list({id(p): p for p in (self.pool, *(s.pool for s in self.sequences))}.values())

    @property
    def nbytes(self) -> int:
        """Every byte allocated for this layer's context; pages shared with forks and their free space included."""
        if self.engine is None:
            return 0
        pages = sum(p.nbytes for p in self._pools)
        return pages + self.exact_bytes + sum(s.table_bytes for s in self.sequences)

    @property
    def used_bytes(self) -> int:
        """What this layer's own sequences need: their pages, shared or not, each once; exact tokens; tables."""
        pages = {(id(s.pool), p): s.pool.page_bytes for s in self.sequences for p in s.pages}
        return sum(pages.values()) + self.exact_bytes + sum(s.table_bytes for s in self.sequences)

    def report(self) -> dict[str, Any]:
        """Bytes by kind, tokens, bits per folded value, and, where somebody watches, how exact folded attention is."""
        if self.engine is None or self._built is None:
            return {"layer": self.layer, "kind": "folded", "bytes": 0}
        heads, dim, _, _, value_dim = self._built
        return {
            "layer": self.layer,
            "kind": "folded" if self.variant.reach is None else "folded window",
            "backend": self.engine.name,
            **self.engine.running(),
            "bytes": self.nbytes,
            "page_bytes": sum(p.nbytes for p in self._pools),
            "pages": sum(p.pages_used for p in self._pools),
            "exact_bytes": self.exact_bytes,
            "table_bytes": sum(s.table_bytes for s in self.sequences),
            "tokens": sum(s.length for s in self.sequences),
            "folded_tokens": sum(s.folded - s.given_up * PAGE_TOKENS for s in self.sequences),
            "bits_per_value": 8 * self.engine.page_bytes / (PAGE_TOKENS * heads * (dim + value_dim)),
            **({} if self.fidelity is None else {"fidelity": self.fidelity.report()}),
        }
