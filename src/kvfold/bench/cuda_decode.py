"""Decode attention on a GPU: folded pages against the 16-bit kernels of torch, in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvfold.bench.cuda_timing import Timing, rotations, time_calls, time_launches
from kvfold.codebook import table
from kvfold.codebook.trellis import code
from kvfold.config import TRELLIS_CODECS, CacheSpec, SideSpec
from kvfold.engine.cuda.arguments import sequence_words
from kvfold.engine.cuda.engine import KEYS_ONLY, CudaEngine
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView

CODECS = {
    "4": ("mse", 4),
    "3": ("mse", 3),
    "2": ("mse", 2),
    "u": ("uniform", 2),
    "a": ("trellis", 3.5),
    "b": ("trellis", 2.5),
    "c": ("trellis", 3),
    "d": ("trellis", 2),
    "e": ("trellis", 1.5),
    "f": ("trellis", 1),
    "g": ("computed", 3),
    "h": ("computed", 2),
}


@dataclass(frozen=True)
class Shape:
    """lengths: tokens per sequence, the new one included. scattered: pages in random places instead of in order."""

    lengths: tuple[int, ...]
    scattered: bool = False
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def values(self) -> int:
        """Numbers of K and V together."""
        return 2 * sum(self.lengths) * self.kv_heads * self.dim


def side_spec(letter: str, scale: str, search: int) -> SideSpec:
    codec, bits = CODECS[letter]
    if codec in TRELLIS_CODECS:
        search = 1  # of paths
    return SideSpec(codec, bits, scale, search=search)


def engine(key: str, value: str, shape: Shape, bulk: bool | None = None, search: int = 1) -> CudaEngine:
    spec = CacheSpec(side_spec(key, "unbiased", search), side_spec(value, "least-squares", search))
    return CudaEngine(
        spec, LayerShape(0, shape.kv_heads, shape.dim, 2), torch.bfloat16, torch.device("cuda", 0), bulk=bulk
    )


def random_pages(e: CudaEngine, count: int) -> Tensor:
    """Pages of random codes (every bit pattern is a valid code) with plausible scales; the means are random codes times 0."""
    f, device = e.fragments, e.device
    rows = torch.randint(-(2**31), 2**31 - 1, (count, f.page_bytes // 4), dtype=torch.int32, device=device).view(
        torch.uint8
    )
    for side, spec in (("key", e.spec.key), ("value", e.spec.value)):
        paths = spec.codec in TRELLIS_CODECS
        step = code(spec.bits, spec.codec).step if paths else float(table(spec.codec, int(spec.bits), f.dim).step)
        for half in f.halves(rows, side):
            if paths:  # headers stay random
                unit = torch.full((1, 1), step / 32, dtype=torch.float16, device=device)
            else:
                unit = ((0.2 + 1.6 * torch.rand(*half.shape[:-1], 8, 8, device=device)) * step).half()
            f.sides[side].put_units(half, unit)
            if side == "key":
                f.sides[side].put_mean_scale(half, torch.zeros(2, dtype=torch.uint8, device=device))
    return rows


class FoldedBatch:
    """One rotating input: pages of all sequences in random places of one slab, rings, sinks, tables on the device."""

    def __init__(self, e: CudaEngine, shape: Shape) -> None:
        self.e, self.shape = e, shape
        h, d, device = shape.kv_heads, shape.dim, e.device
        folded = [e.spec.folded_tokens(n - 1) for n in shape.lengths]
        self.slab = random_pages(e, sum(folded) // 128)
        order = (torch.randperm if shape.scattered else torch.arange)(len(self.slab), device=device)
        self.table = order * e.page_bytes + self.slab.data_ptr()
        ring = e.spec.ring_tokens()
        self.exact = [torch.randn(4, h, ring, d, device=device, dtype=torch.bfloat16) for _ in shape.lengths]
        words, at = [], 0
        for n, f, x in zip(shape.lengths, folded, self.exact, strict=True):
            pages = self.table[at : at + max(1, f // 128)]
            words.append(torch.from_numpy(sequence_words(x[0], x[1], x[2], x[3], pages, n - 1, f, 0, f % ring, ring)))
            at += f // 128
        self.sequences = torch.stack(words).to(device)
        b = len(shape.lengths)
        self.q = torch.randn(b, shape.heads, 1, d, device=device, dtype=torch.bfloat16)
        self.k, self.v = torch.randn(2, b, h, 1, d, device=device, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        exact = sum(n - f + e.spec.sinks for n, f in zip(shape.lengths, folded, strict=True))
        self.bytes = self.slab.nbytes + 8 * len(self.table) + 4 * exact * h * d

    def call(self, variant: tuple[int, ...] | None = None, dependent: bool = True) -> Callable[[], None]:
        return lambda: self.e.attend_rows(
            self.q, self.k, self.v, self.shape.dim**-0.5, self.sequences, self.out, variant, dependent
        )


def folded_batches(e: CudaEngine, shape: Shape) -> list[FoldedBatch]:
    first = FoldedBatch(e, shape)
    return [first, *(FoldedBatch(e, shape) for _ in range(rotations(first.bytes) - 1))]


def repeat(batches: int, call_bytes: int) -> int:
    """Calls per measurement: whole rounds over the rotating inputs, at least a few for short calls."""
    least = 8 if call_bytes < 2e8 else 2 if call_bytes < 1e9 else 1
    return max(batches, least)


def folded_calls(
    batches: list[FoldedBatch], variant: tuple[int, ...] | None = None, dependent: bool = True
) -> list[Callable[[], None]]:
    """Decode attention, the calls of one measurement."""
    n = repeat(len(batches), batches[0].bytes)
    return [batches[i % len(batches)].call(variant, dependent) for i in range(n)]


def time_folded(batches: list[FoldedBatch], variant: tuple[int, ...] | None = None, dependent: bool = True) -> Timing:
    return time_calls(folded_calls(batches, variant, dependent))


def sixteen_bit_calls(shape: Shape, backend: SDPBackend) -> list[Callable[[], Tensor]]:
    """scaled_dot_product_attention over a bfloat16 cache; all sequences as long as the longest. Calls of one measurement."""
    b, n, h, d = len(shape.lengths), max(shape.lengths), shape.kv_heads, shape.dim
    call_bytes = 4 * b * n * h * d
    q = torch.randn(b, shape.heads, 1, d, device="cuda", dtype=torch.bfloat16)
    caches = [
        tuple(torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(rotations(call_bytes))
    ]

    def attend(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=shape.heads != h)

    return [functools.partial(attend, *caches[i % len(caches)]) for i in range(repeat(len(caches), call_bytes))]


def time_sixteen_bit(shape: Shape, backend: SDPBackend) -> Timing:
    return time_calls(sixteen_bit_calls(shape, backend))


def folded_logits(batches: list[FoldedBatch]) -> list[Callable[[], None]]:
    """Scores of one query per head over the pages alone, the calls of one measurement."""
    e, shape = batches[0].e, batches[0].shape
    variant = e.variant(shape.heads // shape.kv_heads, KEYS_ONLY)
    tokens = max(e.spec.folded_tokens(n - 1) for n in shape.lengths)
    out = torch.empty(len(shape.lengths), shape.heads, 1, tokens, dtype=torch.float32, device=e.device)

    def score(x: FoldedBatch) -> None:
        e.attend_rows(x.q, x.q, x.q, shape.dim**-0.5, x.sequences, out, variant, True)

    return [functools.partial(score, batches[i % len(batches)]) for i in range(repeat(len(batches), batches[0].bytes))]


def exact_logits(shape: Shape, dtype: torch.dtype) -> dict[str, list[Callable[[], Tensor]]]:
    """The same by products with keys of `dtype` in equally long rows, in both orders: which is faster depends on the dtype."""
    b, n, h, d = len(shape.lengths), max(shape.lengths), shape.kv_heads, shape.dim
    q = torch.randn(b, h, shape.heads // h, d, device="cuda", dtype=dtype)
    call_bytes = b * n * h * d * dtype.itemsize
    keys = [torch.randn(b, h, n, d, device="cuda", dtype=dtype) for _ in range(rotations(call_bytes))]
    calls = [keys[i % len(keys)] for i in range(repeat(len(keys), call_bytes))]
    return {
        "query by keys": [functools.partial(torch.matmul, q, k.mT) for k in calls],
        "keys by query": [functools.partial(torch.matmul, k, q.mT) for k in calls],
    }


def time_fold(e: CudaEngine, pages: int) -> Timing:
    """One fold call over `pages` pages of all KV heads, as a prefill chunk leaves them: keys [H, T, D] cut into pages."""
    h, d = e.shape.kv_heads, e.shape.head_dim
    k, v = torch.randn(2, h, pages * 128, d, device=e.device, dtype=torch.bfloat16)
    out = torch.empty(pages, e.page_bytes, dtype=torch.uint8, device=e.device)
    addresses = torch.arange(pages, device=e.device) * e.page_bytes + out.data_ptr()
    addresses[0] |= 1  # a sequence's first page
    kp, vp = (x.unflatten(1, (-1, 128)).transpose(0, 1) for x in (k, v))
    return time_calls([lambda: e.fold_to(kp, vp, addresses)])


def time_prefill(e: CudaEngine, prefix: int, new: int, heads: int) -> tuple[Timing, Timing]:
    """`new` tokens over a folded prefix, against two flash calls (prefix, causal new part) over a 16-bit cache."""
    h, d, device = e.shape.kv_heads, e.shape.head_dim, e.device
    q = torch.randn(1, heads, new, d, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, h, new, d, device=device, dtype=torch.bfloat16)
    sinks = torch.randn(2, h, e.spec.sinks, d, device=device, dtype=torch.bfloat16)
    recent = torch.randn(2, h, 64, d, device=device, dtype=torch.bfloat16)
    pages = random_pages(e, prefix // 128)
    row = SequenceView([pages], prefix, sinks[0], sinks[1], recent[0], recent[1], 0, None, None)
    folded = time_launches(lambda: e.attend(AttendRequest(q, k, v, d**-0.5, [row])))
    past = torch.randn(2, 1, h, prefix, d, device=device, dtype=torch.bfloat16)

    def sixteen_bit() -> None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            torch.nn.functional.scaled_dot_product_attention(q, past[0], past[1], enable_gqa=True)
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return folded, time_launches(sixteen_bit)


def time_first_chunk(e: CudaEngine, tokens: int, heads: int, backend: SDPBackend) -> tuple[Timing, Timing]:
    """A prompt's first `tokens` tokens through a 16-bit causal kernel, with the fold of all their pages and without it."""
    h, d, device = e.shape.kv_heads, e.shape.head_dim, e.device
    q = torch.randn(1, heads, tokens, d, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, h, tokens, d, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens // 128, e.page_bytes, dtype=torch.uint8, device=device)
    addresses = torch.arange(len(out), device=device) * e.page_bytes + out.data_ptr()
    addresses[0] |= 1
    kp, vp = (x[0].unflatten(1, (-1, 128)).transpose(0, 1) for x in (k, v))

    def attend() -> None:
        with sdpa_kernel([backend]):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def attend_and_fold() -> None:
        attend()
        e.fold_to(kp, vp, addresses)

    return time_launches(attend_and_fold), time_launches(attend)
