"""Fold, attend and unfold with the CUDA kernels. Pages lie in fragment order; see fragments.py for the bijection."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvfold.codec.torch_trellis import Trellis
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.cuda import driver
from kvfold.engine.cuda.arguments import (
    AppendArgs,
    DecodeArgs,
    UnfoldArgs,
    levels_of,
    plan_rings,
    sequence_words,
    share,
    shared_limit,
)
from kvfold.engine.cuda.folding import folder, not_finite
from kvfold.engine.cuda.formats import format_of
from kvfold.engine.cuda.fragments import Fragments
from kvfold.engine.cuda.memory import aligned, current, dense, pointer, workspace
from kvfold.engine.cuda.prefill import MIN_COLUMNS, TILE_TOKENS, Merge, attention_part
from kvfold.engine.cuda.streams import Search, level_pairs
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import AttendRequest, LayerShape, Runs, SequenceView
from kvfold.errors import NoImplementation
from kvfold.rotation.reference import signs, stream

HEAD_DIMS = (64, 128, 256)
CODECS = {"mse": (2, 3, 4), "uniform": (2,), "trellis": (1, 1.5, 2, 2.5, 3, 3.5), "computed": (2, 3)}
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
MAX_BATCH = 128  # kernels/ring.cuh
COPY_MIN_CAPABILITY = (9, 0)  # bulk copies; below it cp.async
MIN_CAPABILITY = (8, 0)
KEYS_ONLY = 4  # mode of a kernel's variant: logits.cu


def why_not(spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason against this engine for a layer; empty if it can run it."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"device is {device.type}, not cuda")
    elif torch.version.cuda is None:
        reasons.append("this torch is built for another GPU maker")
    elif not torch.cuda.is_available():
        reasons.append("torch sees no GPU")
    elif torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        reasons.append("the GPU is older than sm_80")
    elif (missing := driver.missing()) != "":
        reasons.append(missing)
    if shape.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {shape.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not bfloat16 or float16")
    for side, s in (("key", spec.key), ("value", spec.value)):
        if s.bits not in CODECS.get(s.codec, ()):
            reasons.append(f"no kernel for {side} codec {s.codec!r} at {s.bits:g} bits")
        elif s.rotation != "hadamard":
            reasons.append(f"{side} rotation is {s.rotation!r}, kernels have 'hadamard' only")
    return reasons


class CudaEngine:
    """One layer's pages on a GPU. Kernel variants are compiled on first use and kept per process."""

    name = "cuda"

    def __init__(
        self, spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device, bulk: bool | None = None
    ) -> None:
        """bulk: None = bulk copies where the chip has them; False forces cp.async (for tests and measurements)."""
        if reasons := why_not(spec, shape, dtype, device):
            raise NoImplementation.of("attention on folded pages", [("cuda", reasons)])
        self.spec, self.shape, self.dtype, self.device = spec, shape, dtype, device
        self.capability = torch.cuda.get_device_capability(device)
        has_bulk = self.capability >= COPY_MIN_CAPABILITY
        self.bulk = has_bulk if bulk is None else bulk and has_bulk
        self.reference = TorchEngine(spec, shape, dtype, device)
        dim = shape.head_dim
        self.formats = (
            format_of(spec.key.codec, spec.key.bits),
            format_of(spec.value.codec, spec.value.bits),
        )
        self.fragments = Fragments(self.reference.layout, *self.formats)
        self.page_bytes = self.fragments.page_bytes
        self.signs = torch.stack(
            [
                torch.stack(
                    [torch.from_numpy(signs(dim, stream(spec.seed, shape.layer, h, side))) for h in shape.heads]
                )
                for side in (0, 1)
            ]
        ).to(device)
        self._levels = [levels_of(s, dim) for s in (spec.key, spec.value)]
        sides = (spec.key, spec.value)
        self._pairs = [level_pairs(s.bits, device) if s.codec == "trellis" else None for s in sides]
        for codec in (self.reference.key, self.reference.value):
            if isinstance(codec, Trellis):
                codec.search = Search(codec.book, dim, self.capability, device)
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count
        # Into and out of the rotated basis by one product each: for thousands of queries cheaper than butterflies in torch.
        eye = torch.eye(dim, device=device).expand(shape.kv_heads, dim, dim)
        self._turns = (self.reference.key.project(eye, None), self.reference.value.lift(eye, None))
        self.nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
        self.folder = folder(spec, self.formats, self.signs, self.nonfinite, self.capability)

    # ---- what the cache asks of every engine
    def running(self) -> dict[str, object]:
        """Nothing to tell: there are no levels and no threads to choose."""
        return {}

    def freeze(self, keys: Tensor, values: Tensor) -> tuple[None, None]:
        return None, None

    def fold(
        self,
        keys: Tensor,
        values: Tensor,
        first: bool,
        out: list[Tensor],
        state: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """Encode whole pages. keys, values [P, H, 128, D]; out: P rows of page_bytes; first: page 0 is among them (at 0).

        Raises NonFiniteInput if a vector holds NaN or infinity or its scale exceeds float16; `out` is then unspecified.
        """
        if self.folder is None:
            rows = torch.zeros(len(out), self.reference.page_bytes, dtype=torch.uint8, device=self.device)
            self.reference.fold(keys, values, first, list(rows), state)
            for row, target in zip(self.fragments.from_canonical(rows), out, strict=True):
                target.copy_(row)
            return
        addresses = torch.tensor([row.data_ptr() for row in out], dtype=torch.int64)
        addresses[0] |= int(first)
        self.fold_to(keys, values, addresses.to(self.device))
        if int(self.nonfinite):
            self.nonfinite.zero_()
            raise not_finite(self.shape.layer)

    def fold_to(self, keys: Tensor, values: Tensor, addresses: Tensor) -> None:
        """fold without looking at the result. addresses: int64 [P] on the device, odd (one more than it is) that of a sequence's
        page 0, 0 where there is no page to fold. `nonfinite` int32 [1] becomes 1 where `fold` raises. Safe in a CUDA graph."""
        if self.folder is None:
            raise NoImplementation("no kernel folds these two codes together", "Use `fold`")
        k, v = (aligned(x.to(self.dtype)) for x in (keys, values))
        self.folder(k, v, addresses, DTYPES[self.dtype])

    def report_to(self, flag: Tensor) -> None:
        """Let kernels say there, int32 [1] on the device, what `nonfinite` says otherwise."""
        self.nonfinite = flag
        if self.folder is not None:
            self.folder.nonfinite = flag

    def refill(self, row: Tensor, keys: Tensor, values: Tensor, state: tuple[Tensor | None, Tensor | None]) -> None:
        """Rare (a trim into pages, then an append): through the canonical order."""
        canonical = self.to_canonical(row)
        self.reference.refill(canonical, keys, values, state)
        row.copy_(self.from_canonical(canonical))

    def unfold(self, rows: Tensor, state: tuple[Tensor | None, Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
        return self.reference.unfold(self.fragments.to_canonical(rows), state)

    def to_canonical(self, row: Tensor) -> Tensor:
        return self.fragments.to_canonical(row[None])[0]

    def from_canonical(self, row: Tensor) -> Tensor:
        return self.fragments.from_canonical(row[None])[0]

    def attend(self, request: AttendRequest) -> Tensor:
        """Softmax attention over pages, sinks, recent and new tokens: [B, H * G, Q, D] in the dtype of q."""
        out = torch.empty_like(request.q, memory_format=torch.contiguous_format)
        if request.q.shape[2] * (request.q.shape[1] // self.shape.kv_heads) >= MIN_COLUMNS:
            for b, view in enumerate(request.rows):
                self._prefill(request.q[b], request.k[b], request.v[b], request.scale, view, out[b])
            return out
        for b in range(0, len(request.rows), MAX_BATCH):
            rows = request.rows[b : b + MAX_BATCH]
            at = slice(b, b + len(rows))
            table, _held = self.sequences(rows)
            self.attend_rows(request.q[at], request.k[at], request.v[at], request.scale, table, out[at])
        return out

    def sequences(self, rows: list[SequenceView]) -> tuple[Tensor, list[Tensor]]:
        """int64 [B, SEQUENCE_WORDS] on the device, and tensors it points to: hold them until the call is enqueued."""
        words, keep = [], []
        for r in rows:
            recent_k, recent_v = (dense(x) for x in (r.recent_k, r.recent_v))
            sinks = [x.contiguous() for x in (r.sinks_k, r.sinks_v)]
            pages = self.addresses(r.runs)
            keep += [recent_k, recent_v, *sinks, pages]
            words.append(
                sequence_words(
                    recent_k,
                    recent_v,
                    sinks[0],
                    sinks[1],
                    pages,
                    r.folded + recent_k.shape[1],
                    r.folded,
                    r.pads,
                    0,
                    max(1, recent_k.shape[1]),
                )
            )
        return torch.from_numpy(np.stack(words)).to(self.device), keep

    def logits(self, q: Tensor, scale: float, rows: list[SequenceView]) -> Tensor:
        """Scores of q [B, H * G, Q, D] over pages alone, float32 [B, H * G, Q, tokens of the most pages]: scale <q, key>.

        -infinity where a row has no such token in its pages, and for sinks, whose keys are known exactly.
        """
        tokens = PAGE_TOKENS * max(sum(map(len, r.runs)) for r in rows)
        out = torch.full((*q.shape[:3], tokens), float("-inf"), dtype=torch.float32, device=self.device)
        variant = self.variant(q.shape[1] // self.shape.kv_heads * q.shape[2], KEYS_ONLY)
        for b in range(0, len(rows), MAX_BATCH):
            at = slice(b, b + MAX_BATCH)
            table, _held = self.sequences(rows[at])
            self.attend_rows(q[at], q[at], q[at], scale, table, out[at], variant)
        return out

    def unfold_tile(self, addresses: Tensor, k: Tensor, v: Tensor) -> None:
        """Pages at `addresses` int64 [P] -> k, v [H, P * 128, D] in the rotated basis, keys with their rotated mean."""
        dim = self.shape.head_dim
        kernel = driver.kernel(
            "unfold.cu", (dim, *self.formats, int(self.spec.centre), DTYPES[self.dtype]), self.capability, 1
        )
        a = UnfoldArgs(
            addresses.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            self.signs[0].data_ptr(),
            k.stride(0),
            *self._levels,
            *(pointer(x) for x in self._pairs),
        )
        kernel.launch(
            (len(addresses), self.shape.kv_heads, 4), 128, torch.cuda.current_stream(self.device).cuda_stream, a
        )

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, view: SequenceView, out: Tensor) -> None:
        """One row: q [H * G, Q, D], k, v [H, Q, D], out like q."""
        out[:, : view.pads] = 0
        q, k, v = (x[:, view.pads :] for x in (q, k, v))
        heads, dim, new = self.shape.kv_heads, self.shape.head_dim, q.shape[1]
        if new == 0:
            return
        groups = q.shape[0] // heads
        rows = q.unflatten(0, (heads, groups)).flatten(1, 2)  # [H, G * Q, D]
        rotated, exact = Merge(), Merge()
        if view.folded:
            turned = (rows.float() @ self._turns[0]).to(self.dtype)
            pages, step = self.addresses(view.runs), TILE_TOKENS // PAGE_TOKENS
            tile = torch.empty(2, heads, min(step, len(pages)) * PAGE_TOKENS, dim, dtype=self.dtype, device=self.device)
            for p in range(0, len(pages), step):
                some = pages[p : p + step]
                self.unfold_tile(some, tile[0], tile[1])
                at = slice(
                    self.spec.sinks if p == 0 else 0, min(len(some) * PAGE_TOKENS, view.folded - p * PAGE_TOKENS)
                )
                if at.start < at.stop:
                    rotated.add(*attention_part(turned, tile[0, :, at], tile[1, :, at], False, scale))
        sinks = self.spec.sinks if view.folded else 0
        past_k, past_v = (
            torch.cat([a[:, :sinks], b], dim=1)
            for a, b in ((view.sinks_k, view.recent_k), (view.sinks_v, view.recent_v))
        )
        if past_k.shape[1]:
            exact.add(*attention_part(rows, past_k, past_v, False, scale))
        fresh_k, fresh_v = (x.repeat_interleave(groups, 0) for x in (k, v))
        o, lse = attention_part(q, fresh_k, fresh_v, True, scale)
        exact.add(o.unflatten(0, (heads, groups)).flatten(1, 2), lse.unflatten(0, (heads, groups)).flatten(1, 2))
        if rotated.out is not None:
            exact.add(rotated.out @ self._turns[1], rotated.lse)
        out[:, view.pads :] = exact.out.unflatten(1, (groups, new)).flatten(0, 1).to(out.dtype)  # type: ignore[union-attr]

    def addresses(self, runs: list[Tensor]) -> Tensor:
        """int64 device tensor: the address of every page. Kept while the pages stay the same, i.e. until the next fold."""
        if isinstance(runs, Runs) and runs.table is not None:
            return runs.table
        parts = [np.arange(len(r), dtype=np.int64) * self.page_bytes + r.data_ptr() for r in runs]
        table = torch.from_numpy(np.concatenate(parts) if parts else np.zeros(1, np.int64)).to(self.device)
        if isinstance(runs, Runs):
            runs.table = table
        return table

    def variant(self, columns: int, mode: int = 0) -> tuple[int, ...]:
        """Compile-time constants of the decode kernel for rows of `columns` queries (see kernels/decode.cu)."""
        dim = self.shape.head_dim
        groups = 1 if columns <= 4 else 2 if columns <= 8 or dim == 256 else 4
        warps, slots = plan_rings(dim, self.formats, self.spec.centre, groups, shared_limit(self.capability))
        return (
            dim,
            *self.formats,
            int(self.spec.centre),
            groups,
            warps,
            slots,
            int(self.bulk),
            DTYPES[self.dtype],
            mode,
        )

    def attend_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sequences: Tensor,
        out: Tensor,
        variant: tuple[int, ...] | None = None,
        dependent: bool = False,
    ) -> None:
        """attend without building tables: sequences int64 [B, SEQUENCE_WORDS] on the device. Safe in a CUDA graph.

        A variant of mode KEYS_ONLY writes logits instead: out float32 [B, H * G, Q, tokens]; k and v are not read.
        """
        b, heads, new, _ = q.shape
        h = self.shape.kv_heads
        q, k, v = (aligned(x) for x in (q, k, v))
        variant = variant or self.variant(heads // h * new)
        source = "logits.cu" if variant[-1] == KEYS_ONLY else "decode.cu"
        kernel = driver.kernel(source, variant, self.capability, 4)
        _, partial, columns, threads = kernel.info
        tiles = -(-(heads // h) * new // columns)
        work, count = workspace(self.device.index or 0, 2 * self._blocks * partial, b * h * tiles)
        a = DecodeArgs(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            sequences.data_ptr(),
            self.signs[0].data_ptr(),
            self.signs[1].data_ptr(),
            work.data_ptr(),
            count.data_ptr(),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            b,
            h,
            heads // h,
            new,
            self.spec.sinks,
            tiles,
            *share(b * h * tiles, self._blocks),
            scale,
            *self._levels,
            *(pointer(x) for x in self._pairs),
        )
        stream_ = torch.cuda.current_stream(self.device).cuda_stream
        kernel.launch((self._blocks, 1, 1), threads, stream_, a, dependent and self.capability >= COPY_MIN_CAPABILITY)

    # ---- steps that the host takes no part in
    def ready(self) -> tuple[Tensor, Tensor]:
        """Load what `append` runs, and return the memory that attention works in since its last call. A graph of the
        two points to it: hold on to it, for a larger call replaces it."""
        self._append()
        return self.memory()

    def memory(self) -> tuple[Tensor, Tensor]:
        """What the last call of attention worked in. A graph of it points there: hold on to it."""
        return current(self.device.index or 0)

    def _append(self) -> driver.Kernel:
        return driver.kernel("append.cu", (self.shape.head_dim, DTYPES[self.dtype]), self.capability, 1)

    def append(self, k: Tensor, v: Tensor, sequences: Tensor, nonfinite: Tensor) -> None:
        """Put tokens k, v [B, H, 1, D] into the rings that `sequences` int64 [B, SEQUENCE_WORDS] tells of, and count them
        there. nonfinite: int32 [1], becomes 1 if a vector holds NaN or infinity. Safe in a CUDA graph."""
        k, v = (aligned(x) for x in (k, v))
        a = AppendArgs(
            k.data_ptr(),
            v.data_ptr(),
            sequences.data_ptr(),
            nonfinite.data_ptr(),
            *k.stride()[:2],
            *v.stride()[:2],
            self.shape.kv_heads,
        )
        self._append().launch((len(k), 1, 1), 256, torch.cuda.current_stream(self.device).cuda_stream, a)
