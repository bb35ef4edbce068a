"""Attention over canonical pages with Triton kernels: GPUs and shapes that the CUDA engine does not take.

Pages are those of the torch engine, which folds them; the search of trellis codes is a kernel (viterbi.py). Attention is two
launches: sums over parts of the pages, then everything else; see kernels.py.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.codebook import table
from kvfold.codec.torch_trellis import Trellis
from kvfold.config import CacheSpec, SideSpec
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import AttendRequest, LayerShape, Runs, SequenceView
from kvfold.engine.triton import OPTIONS
from kvfold.errors import NoImplementation

CODECS = {"mse": (1, 2, 3, 4), "uniform": (2,), "trellis": (1, 1.5, 2, 2.5, 3, 3.5, 4), "computed": (2, 3)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cuda", "xpu")  # ROCm's torch calls its devices cuda, too
MULTIPLE, NARROW, MAX_DIM = 16, 128, 256
TILES = (16, 32, 64)  # columns of a tile; the last up to head_dim 128
WAVES = 2  # programs per multiprocessor that a call is split into
ZERO = 64  # codes.py: levels are stored above it


def why_not(spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason against this engine for a layer; empty if it can run it."""
    reasons = []
    if device.type not in DEVICES:
        reasons.append(f"device is {device.type}, not {' or '.join(DEVICES)}")
    elif find_spec("triton") is None:
        reasons.append("triton is not installed")
    for dim in dict.fromkeys(shape.dims):
        if dim % MULTIPLE or dim > MAX_DIM:
            reasons.append(f"head_dim {dim} is not a multiple of {MULTIPLE} up to {MAX_DIM}")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not bfloat16, float16 or float32")
    if shape.variant.latent:
        reasons.append("no kernel for latent keys")
    if shape.variant.reach is not None and shape.variant.reach.chunked:
        reasons.append("no kernel for chunks")
    for side, s in (("key", spec.key), ("value", spec.value)):
        if s.bits not in CODECS.get(s.codec, ()):
            reasons.append(f"no kernel for {side} codec {s.codec!r} at {s.bits:g} bits")
    return reasons


def book_of(spec: SideSpec, codec: object, dim: int) -> tuple[tuple[int, int], NDArray[np.integer]]:
    """(bits of even and of odd steps, what codes.py reads levels from)."""
    if isinstance(codec, Trellis):
        pairs = codec.levels.cpu().numpy().astype(np.int64) + ZERO
        even, odd = (codec.book.widths * 2)[:2]
        return (even, odd), np.concatenate([np.resize(codec.book.starts, 4), pairs[:, 0] | pairs[:, 1] << 8]).astype(
            np.int16
        )
    levels = np.resize(table(spec.codec, int(spec.bits), dim).levels + ZERO, 16)
    return (int(spec.bits), 0), levels.astype(np.uint8).view(np.int32)


class TritonEngine(TorchEngine):
    """Pages of one layer in canonical byte order, read by Triton kernels."""

    name = "triton"

    def __init__(self, spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
        if reasons := why_not(spec, shape, dtype, device):
            raise NoImplementation.of("attention on folded pages", [("triton", reasons)])
        super().__init__(spec, shape, dtype, device)
        self.kernels: ModuleType = importlib.import_module("kvfold.engine.triton.kernels")
        if device.type != "cpu":  # where the interpreter would be slower than torch
            search = importlib.import_module("kvfold.engine.triton.viterbi").Search
            for codec in (self.key, self.value):
                if isinstance(codec, Trellis):
                    codec.search = search(codec.book, device)
        heads, (dim, value_dim) = shape.kv_heads, shape.dims
        (key, key_book), (value, value_book) = (
            book_of(spec.key, self.key, dim),
            book_of(spec.value, self.value, value_dim),
        )
        self._books = tuple(torch.from_numpy(b).to(device) for b in (key_book, value_book))
        first_value = self.layout.offset("value", self.layout.value[0].name)
        mean = self.layout.offset("mean", "codes") if spec.centre else 0
        self._page_shape = (*key, *value, first_value, mean, self.layout.head_bytes)
        # Into and out of the rotated basis by one product each, whatever the rotation.
        eyes = (torch.eye(d, device=device).expand(heads, d, d) for d in (dim, value_dim))
        self._turns = (self.key.project(next(eyes), None).contiguous(), self.value.lift(next(eyes), None).contiguous())
        self._programs = WAVES * multiprocessors(device)
        self._wide = max(shape.dims) > NARROW
        self._dot = self.kernels.dot_type(dtype, device.type)

    def running(self) -> dict[str, object]:
        """Nothing to tell: there are no levels and no threads to choose."""
        return {}

    def attend(self, request: AttendRequest) -> Tensor:
        """Softmax attention over pages, sinks, recent and new tokens: [B, H * G, Q, D of values] in the dtype of q."""
        heads, (_, value_dim) = self.shape.kv_heads, self.shape.dims
        batch, new = len(request.q), request.q.shape[2]
        groups = request.q.shape[1] // heads
        q = request.q.unflatten(1, (heads, groups)).transpose(2, 3).flatten(2, 3).contiguous()  # [B, H, Q G, D]
        k, v = request.k.contiguous(), request.v.contiguous()
        keep, words = [], []
        for b, view in enumerate(request.rows):
            record, held = self.row_words(view, k[b], v[b])
            words.append(record)
            keep.append(held)
        rows = torch.from_numpy(np.stack(words)).to(self.device)
        columns = new * groups
        most = TILES[-2 if self._wide else -1]
        tile = next(t for t in TILES if t >= columns or t == most)
        tiles = -(-columns // tile)
        longest = max(-(-view.folded // self.kernels.HALF.value) for view in request.rows)
        splits = max(1, min(longest, -(-self._programs // (batch * heads * tiles)))) if longest else 0
        parts = torch.empty(
            batch * heads * tiles * splits * tile * (value_dim + 2), dtype=torch.float32, device=self.device
        )
        call = (
            heads,
            groups,
            tile,
            *self.shape.dims,
            self.spec.sinks,
            request.softcap or 0.0,
            self.shape.variant.reach.tokens if self.shape.variant.reach is not None else 0,
        )
        if splits:
            plain = q.float() * request.scale
            queries = torch.stack([plain, plain @ self._turns[0]])
            self.kernels.pages[splits, tiles, batch * heads](
                queries, rows, *self._books, parts, new, call, self._page_shape, **OPTIONS
            )
        out = q.new_empty(batch, heads, columns, value_dim)
        logits = None if request.sink_logits is None else request.sink_logits.float().contiguous()
        self.kernels.finish[tiles, batch * heads](
            q,
            out,
            rows,
            self._turns[1],
            parts,
            splits,
            new,
            request.scale,
            logits,
            call,
            self._dot,
            **OPTIONS,
        )
        return out.unflatten(2, (new, groups)).transpose(2, 3).flatten(1, 2)

    def row_words(self, view: SequenceView, k: Tensor, v: Tensor) -> tuple[NDArray[np.int64], list[Tensor]]:
        """A row's record for the kernels, and the tensors it points to.

        Addresses of the page table; tokens in pages, recent ones, pads; then of keys and of values: addresses of sinks and of
        recent tokens, bytes from head to head of these, addresses of new tokens [H, Q, D].
        """
        sinks = [x.contiguous() for x in (view.sinks_k, view.sinks_v)]
        recent = [x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (view.recent_k, view.recent_v)]
        pages = self.addresses(view.runs)
        words = [pages.data_ptr(), view.folded, recent[0].shape[1], view.pads]
        words += [x.data_ptr() for x in (*sinks, *recent)]
        words += [x.stride(0) * x.element_size() for x in recent]
        words += [k.data_ptr(), v.data_ptr()]
        return np.array(words, np.int64), [*sinks, *recent, pages]

    def addresses(self, runs: list[Tensor]) -> Tensor:
        """int64 device tensor: the address of every page. Kept while the pages stay the same, i.e. until the next fold."""
        if isinstance(runs, Runs) and runs.table is not None:
            return runs.table
        parts = [np.arange(len(r), dtype=np.int64) * r.stride(0) + r.data_ptr() for r in runs]
        found = torch.from_numpy(np.concatenate(parts) if parts else np.zeros(1, np.int64)).to(self.device)
        if isinstance(runs, Runs):
            runs.table = found
        return found


def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side, roughly."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units // 8
    return 1
