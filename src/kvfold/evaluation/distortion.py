"""The paper's own figures, measured through the codecs that ship: squared error and inner products of random vectors.

NumPy only, but for the search of trellis paths, which the native library does, to the same end, where there is one. `mse`,
`uniform` and `trellis` run the canonical float32 encoder, the others their float64 references; scales are what a page holds,
and every stored byte is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from kvfold.codebook.trellis import Code
from kvfold.codec.fields import fields, split_bits, split_dims
from kvfold.codec.reference import build
from kvfold.codec.trellis import Search, Trellis, viterbi
from kvfold.config import CODEC_BITS, PAGE_TOKENS, TRELLIS_CODECS, SideSpec
from kvfold.errors import InvalidConfig, UnknownCodec
from kvfold.rotation.reference import stream

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
Row = dict[str, str | float | int | None]

# Rotations and sketches to average over: the mean length of the rows of one Gaussian sketch is off by 1 / (sqrt(2) D),
# which biases its slope by as much; 32 of them bring that to .1 % at D = 128.
HEADS = 32
# Values of all vectors together. A vector's squared error has a relative spread of at most 2.1 / sqrt(D / 2) (4 bits) and the
# inner product of a one-bit sketch one of 2.1 / sqrt(D) of what the slope is divided by, so that both standard errors
# depend on D * vectors alone: .1 %, against the .3 % (error) and .5 % (slope: 2 % at four of them) that are wanted.
VALUES = 1 << 23
PANTER_DITE = math.sqrt(3) * math.pi / 2
# Codecs whose width is not a choice.
FIXED_RATE = tuple(name for name, widths in CODEC_BITS.items() if len(widths) == 1 and name not in ("raw", "uniform"))


def measure(
    dim: int, bits: Sequence[float], codec: str, seed: int = 0, scale: str = "norm", search: int = 1
) -> list[Row]:
    """One row per width: `codec, bits, bits_per_value, mse, lower_bound, upper_bound, ip_slope, ip_variance_times_dim`.
    scale, search: as SideSpec has them.

    Vectors x and queries q are uniform directions of length 1 with <q, x> uniform on [0, 1]. `mse` is the mean of
    |x - x_hat|^2; `ip_slope` the regression of <q, x_hat> on <q, x> through the origin, `ip_variance_times_dim` D times the
    variance around that line. lower_bound 4^-b holds for `mse` and for D times the variance alike; upper_bound is the
    paper's for what the codec promises (see `upper_bound`). Fixed-rate codecs take no bits; [] means every width.

    Raises UnknownCodec, InvalidConfig for a width the codec lacks, UnsupportedHeadDim.
    """
    if codec not in CODEC_BITS:
        raise UnknownCodec(f"unknown codec {codec!r}", f"Use one of: {', '.join(CODEC_BITS)}")
    if codec == "raw":
        raise InvalidConfig("codec 'raw' stores the numbers themselves", "There is no distortion to measure")
    if codec in FIXED_RATE and bits:
        raise InvalidConfig(
            f"codec {codec!r} has the one rate of {CODEC_BITS[codec][0]:g} bits", "Leave out the choice of bits"
        )
    return [_measure(dim, SideSpec(codec, b, scale, search=search), seed) for b in bits or CODEC_BITS[codec]]


def _measure(dim: int, spec: SideSpec, seed: int) -> Row:
    stored = 8 * sum(f.page_bytes for f in fields(spec, dim)) / PAGE_TOKENS
    per_head = max(1, VALUES // (HEADS * dim))
    random = np.random.default_rng([seed, dim])
    error, cross, truth_square, estimate_square = 0.0, 0.0, 0.0, 0.0
    for head in range(HEADS):
        x, q, truth = pairs(per_head, dim, random)
        one = build(spec, dim, stream(seed, 0, head, 0))
        if isinstance(one, Trellis):
            one.viterbi = fastest_search()
        # Outlier channels chosen without looking: among random directions the longest of a sample are an accident.
        state = one.freeze(np.ones((1, dim)))
        x_hat = one.decode(one.encode(x, state), state)
        estimate = (q * x_hat).sum(-1)
        error += float(((x - x_hat) ** 2).sum())
        cross += float(truth @ estimate)
        truth_square += float(truth @ truth)
        estimate_square += float(estimate @ estimate)
    count = HEADS * per_head
    slope = cross / truth_square
    return {
        "codec": spec.codec,
        "bits": int(spec.bits) if spec.bits == int(spec.bits) else spec.bits,
        "bits_per_value": stored / dim,
        "mse": error / count,
        "lower_bound": 4.0**-spec.bits,
        "upper_bound": upper_bound(spec, dim),
        "ip_slope": slope,
        "ip_variance_times_dim": dim * (estimate_square - slope * cross) / count,
    }


def fastest_search() -> Search:
    """codec.trellis.viterbi, or the native library's, which is tested to find the same path."""
    if find_spec("torch") is None:
        return viterbi
    import torch

    from kvfold.engine.cpu import trellis as native

    if native.missing():
        return viterbi

    def search(x: NDArray[np.int32], book: Code) -> tuple[U8, U8]:
        symbols, states = native.viterbi(torch.from_numpy(x), book)
        return symbols.numpy(), states.numpy()

    return search


def pairs(count: int, dim: int, random: np.random.Generator) -> tuple[F64, F64, F64]:
    """(x [count, dim], q [count, dim], <q, x> [count]): unit vectors whose inner products are uniform on [0, 1]."""
    x, w = random.standard_normal((2, count, dim))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    w -= (w * x).sum(-1, keepdims=True) * x
    w /= np.linalg.norm(w, axis=-1, keepdims=True)
    truth = random.random(count)
    q = truth[:, None] * x + np.sqrt(1 - truth**2)[:, None] * w
    return x, q, truth


def upper_bound(spec: SideSpec, dim: int) -> float | None:
    """What the papers prove of the codec, for vectors of length 1; None where they prove no constant (`polar`).

    `mse`, and `uniform` at the same width: |x - x_hat|^2 <= sqrt(3) pi / 2 4^-b (TurboQuant, Theorem 1). `split`: Theorem 1 of
    each part, for energy spread evenly. `prod`: D times the variance <= sqrt(3) pi^2 4^-b (Theorem 2). `qjl`: D times the
    variance <= pi / 2 (Lemma 4).
    """
    if spec.codec in ("mse", "uniform", *TRELLIS_CODECS):
        return PANTER_DITE * 4.0**-spec.bits
    if spec.codec == "split":
        parts = zip(split_dims(dim), split_bits(spec.bits), strict=True)
        return PANTER_DITE * sum(d / dim * 4.0**-b for d, b in parts)
    if spec.codec == "prod":
        return 2 * math.pi * PANTER_DITE * 4.0**-spec.bits
    if spec.codec == "qjl":
        return math.pi / 2
    return None
