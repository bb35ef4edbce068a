"""Fold, attend and unfold through the native library. Pages lie in its own byte order, a permutation of the canonical one."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.codebook import table
from kvfold.codebook.trellis import code
from kvfold.config import PAGE_TOKENS, TRELLIS_CODECS, CacheSpec, SideSpec
from kvfold.engine.cpu import library, trellis
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView
from kvfold.errors import NoImplementation, NonFiniteInput
from kvfold.packing.layout import PageLayout
from kvfold.rotation.reference import signs, stream

HEAD_DIMS = (64, 96, 128, 256)
CODECS: dict[str, tuple[float, ...]] = {
    "mse": (2, 3, 4),
    "uniform": (2,),
    "trellis": (1, 1.5, 2, 2.5, 3, 3.5),
    "computed": (2, 3),
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TRELLIS_STEP = 64  # coordinates whose symbols fill whole words of a stream at every rate
ROW_ALIGN = 16  # bytes; 64 would cost a 3-bit page of two heads .004 bit per value


def why_not(spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason against this engine for a layer; empty if it can run it."""
    reasons = []
    if (missing := library.missing()) != "":
        reasons.append(missing)
    if device.type != "cpu":
        reasons.append(f"device is {device.type}, not cpu")
    if shape.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {shape.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not float32, bfloat16 or float16")
    for side, s in (("key", spec.key), ("value", spec.value)):
        if s.bits not in CODECS.get(s.codec, ()):
            reasons.append(f"no kernel for {side} codec {s.codec!r} at {s.bits:g} bits")
        elif s.rotation != "hadamard":
            reasons.append(f"{side} rotation is {s.rotation!r}, kernels have 'hadamard' only")
        if s.codec in TRELLIS_CODECS and shape.head_dim in HEAD_DIMS and shape.head_dim % TRELLIS_STEP:
            reasons.append(
                f"{side} codec {s.codec!r} has kernels for multiples of {TRELLIS_STEP}, not {shape.head_dim}"
            )
    return reasons


def _side(spec: SideSpec, dim: int) -> library.Side:
    side = library.Side(scale_rule=library.SCALE_RULES.index(spec.scale), searches=spec.search)
    if spec.codec in TRELLIS_CODECS:
        book = code(spec.bits, spec.codec)
        side.trellis, side.search = ctypes.pointer(trellis.reader(book)), ctypes.pointer(trellis.search(book))
        side.step = book.step
        return side
    grid = table(spec.codec, int(spec.bits), dim)
    side.bits, side.step = int(spec.bits), float(grid.step)
    side.levels[: len(grid.levels)] = [int(v) for v in grid.levels]
    side.thresholds[: len(grid.thresholds)] = [float(v) for v in grid.thresholds]
    return side


def _signs(spec: CacheSpec, shape: LayerShape, side: int) -> NDArray[np.float32]:
    dim = shape.head_dim
    return np.stack([signs(dim, stream(spec.seed, shape.layer, h, side)) for h in shape.heads])


def _vectors(x: Tensor, outer: int) -> library.Vectors:
    """Strides of x [..., heads, tokens, D], D contiguous; `outer` is the stride of what lies before heads, 0 if nothing."""
    return library.Vectors(x.data_ptr(), outer, x.stride(-3), x.stride(-2))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class CpuEngine:
    """One layer's pages on the CPU. `level` and `threads` are fixed at construction."""

    name = "cpu"

    def __init__(
        self,
        spec: CacheSpec,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        level: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Raises NoImplementation with every reason of why_not."""
        if reasons := why_not(spec, shape, dtype, device):
            raise NoImplementation.of("this layer", [(self.name, reasons)])
        self.spec, self.shape, self.dtype, self.device = spec, shape, dtype, device
        self.level = library.choose_level(level)
        self.threads = threads
        self.canonical = TorchEngine(spec, shape, dtype, device)
        self.layout: PageLayout = self.canonical.layout
        self._key_signs, self._value_signs = _signs(spec, shape, 0), _signs(spec, shape, 1)
        self.format = library.Format(
            shape.head_dim,
            shape.kv_heads,
            spec.sinks,
            int(spec.centre),
            _side(spec.key, shape.head_dim),
            _side(spec.value, shape.head_dim),
            self._key_signs.ctypes.data,
            self._value_signs.ctypes.data,
        )
        self.row_bytes = library.call("kvf_row_bytes")(self.format)
        self.page_bytes = -(-self.row_bytes // ROW_ALIGN) * ROW_ALIGN

    def running(self) -> dict[str, object]:
        """Level and threads of the next call, and what its bits depend on besides its inputs: the level, never the threads."""
        return {"level": self.level.name, "threads": self.thread_count(), "bits_depend_on": ["level"]}

    def thread_count(self) -> int:
        return self.threads or library.default_threads()

    def check(self, status: int) -> None:
        if status == library.NO_MEMORY:
            raise MemoryError("the CPU engine could not allocate its workspace")
        if status != library.OK:
            raise NoImplementation.of("this call", [(self.name, [f"the native library answered {status}"])])

    def freeze(self, keys: Tensor, values: Tensor) -> tuple[None, None]:
        """Nothing: the kernel codecs have no state."""
        return None, None

    def fold(
        self, keys: Tensor, values: Tensor, first: bool, out: list[Tensor], state: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Encode whole pages. keys, values [P, H, 128, D]; out: P rows of page_bytes; first: page 0 is among them (at 0).

        Raises NonFiniteInput if a vector holds NaN or infinity or its scale exceeds float16; `out` is then undefined.
        """
        keys, values = _dense(keys), _dense(values.to(keys.dtype))
        rows = (ctypes.c_uint64 * len(out))(*(row.data_ptr() for row in out))
        status = library.call("kvf_fold")(
            self.format,
            self.level.index,
            self.thread_count(),
            DTYPES[keys.dtype],
            _vectors(keys, keys.stride(0)),
            _vectors(values, values.stride(0)),
            len(out),
            int(first),
            rows,
        )
        if status == library.NON_FINITE:
            raise NonFiniteInput(
                f"layer {self.shape.layer}: a key or value vector holds NaN or infinity, or is too long for a float16 scale",
                "Check the model's activations, or use profile 'lossless'",
            )
        self.check(status)

    def refill(self, row: Tensor, keys: Tensor, values: Tensor, state: tuple[Tensor | None, Tensor | None]) -> None:
        """Write tokens [H, n, D] into the tail of a page whose head stays. Rare (after a trim), so by way of torch."""
        canonical = self.to_canonical(row)
        self.canonical.refill(canonical, keys, values, state)
        row.copy_(self.from_canonical(canonical))

    def unfold(self, rows: Tensor, state: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Pages [P, page_bytes] -> reconstructed keys and values, float32 [H, P * 128, D]."""
        size = (len(rows), self.shape.kv_heads, PAGE_TOKENS, self.shape.head_dim)
        keys, values = torch.empty(size), torch.empty(size)
        for row, k, v in zip(rows, keys, values, strict=True):
            self.check(
                library.call("kvf_unfold")(self.format, self.level.index, row.data_ptr(), k.data_ptr(), v.data_ptr())
            )
        return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    def to_canonical(self, row: Tensor) -> Tensor:
        """A page in the byte order of files, uint8 [layout.page_bytes]."""
        out = torch.empty(self.layout.page_bytes, dtype=torch.uint8)
        self.check(library.call("kvf_to_canonical")(self.format, row.data_ptr(), out.data_ptr()))
        return out

    def from_canonical(self, row: Tensor) -> Tensor:
        """The inverse of to_canonical, uint8 [page_bytes]."""
        out = torch.zeros(self.page_bytes, dtype=torch.uint8)
        row = row.contiguous()
        self.check(library.call("kvf_from_canonical")(self.format, row.data_ptr(), out.data_ptr()))
        return out

    def attend(self, request: AttendRequest) -> Tensor:
        """Softmax attention over pages, sinks, recent and new tokens: [B, H * G, Q, D] in the dtype of q.

        Kernels know of a reach in calls of one token, where it hides the same tokens from all rows; others go by way of torch.
        """
        reach = self.shape.variant.reach
        if reach is not None:
            if request.q.shape[2] > 1:
                return self.canonical.attend(replace(request, rows=[self._canonical_view(x) for x in request.rows]))
            request = replace(request, rows=[_read_by_one(x, x.hidden(reach, 0)) for x in request.rows])
        q, k, v = _dense(request.q), _dense(request.k), _dense(request.v)
        k, v = k.to(self.dtype), v.to(self.dtype)
        out = torch.empty(q.shape, dtype=q.dtype)
        kept: list[object] = []  # what the library borrows
        sequences = (library.Sequence * len(request.rows))(*(self._sequence(view, kept) for view in request.rows))
        native = library.AttendRequest(
            ctypes.pointer(self.format),
            sequences,
            q.shape[0],
            q.shape[1],
            q.shape[2],
            DTYPES[q.dtype],
            DTYPES[self.dtype],
            self.level.index,
            self.thread_count(),
            request.scale,
            _vectors(q, q.stride(0)),
            _vectors(k, k.stride(0)),
            _vectors(v, v.stride(0)),
            out.data_ptr(),
        )
        self.check(library.call("kvf_attend")(native))
        return out

    def _sequence(self, view: SequenceView, kept: list[object]) -> library.Sequence:
        pages = page_addresses(view.runs)
        exact = [_dense(x.to(self.dtype)) for x in (view.recent_k, view.recent_v, view.sinks_k, view.sinks_v)]
        kept += [pages, exact]
        return library.Sequence(
            pages.ctypes.data,
            view.folded,
            view.recent_k.shape[1],
            view.pads,
            *(_vectors(x, 0) for x in exact),
            skipped=-view.start,
        )

    def _canonical_view(self, view: SequenceView) -> SequenceView:
        return replace(view, runs=[torch.stack([self.to_canonical(row) for row in run]) for run in view.runs])


def _read_by_one(view: SequenceView, hidden: int) -> SequenceView:
    """What a single query reads that does not read the first `hidden` tokens. start: minus those of them in the first page."""
    pages, beyond = hidden // PAGE_TOKENS, max(0, hidden - view.folded)
    exact = view.recent_k[:, beyond:], view.recent_v[:, beyond:]
    if beyond or hidden == view.folded:
        return replace(view, runs=[], folded=0, recent_k=exact[0], recent_v=exact[1], start=0)
    runs = []
    for run in view.runs:
        runs += [run[pages:]] if len(run) > pages else []
        pages = max(0, pages - len(run))
    cut = hidden // PAGE_TOKENS * PAGE_TOKENS
    return replace(view, runs=runs, folded=view.folded - cut, start=cut - hidden)


def page_addresses(runs: list[Tensor]) -> NDArray[np.uint64]:
    """Where each page of the runs [n, page_bytes] lies, uint64 [pages]."""
    parts = [run.data_ptr() + np.arange(len(run), dtype=np.uint64) * np.uint64(run.stride(0)) for run in runs]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)
