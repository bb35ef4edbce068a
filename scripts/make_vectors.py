#!/usr/bin/env python
"""Write tests/vectors/*.json: canonical pages of known inputs, for whoever writes an encoder or a decoder from FORMAT.md.

Run it when the format changes, which is also when FORMAT_VERSION does; an unchanged format rewrites the same bytes.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.codebook import table
from kvfold.codebook.trellis import code
from kvfold.codec.fields import split_bits, split_dims
from kvfold.config import PAGE_TOKENS, TRELLIS_CODECS, CacheSpec, SideSpec
from kvfold.engine import reference
from kvfold.packing.layout import FORMAT_VERSION
from kvfold.rotation.reference import splitmix64, stream

FOLDER = Path(__file__).parent.parent / "tests" / "vectors"
INPUT_PATH = 1000  # stream of a vector's input: (seed, INPUT_PATH + side)
CASES: dict[str, tuple[CacheSpec, int, int, str]] = {
    "balanced": (
        CacheSpec(SideSpec("mse", 3, "unbiased", search=3), SideSpec("mse", 3, "least-squares", search=3)),
        2,
        128,
        "float32",
    ),
    "mse-4-2": (CacheSpec(SideSpec("mse", 4, "match"), SideSpec("mse", 2, "least-squares"), seed=1), 1, 64, "float16"),
    "mse-1-uniform-2": (
        CacheSpec(SideSpec("mse", 1, "unbiased"), SideSpec("uniform", 2, "unbiased", search=3), sinks=70, seed=2),
        1,
        80,
        "float32",
    ),
    "mse-3-96": (
        CacheSpec(SideSpec("mse", 3), SideSpec("uniform", 2), sinks=0, centre=False, seed=3),
        1,
        96,
        "float32",
    ),
    "mse-5-6": (CacheSpec(SideSpec("mse", 5), SideSpec("mse", 6, "least-squares"), seed=4), 1, 24, "float32"),
    "mse-7-8": (CacheSpec(SideSpec("mse", 7, "unbiased"), SideSpec("mse", 8), seed=5), 1, 10, "float32"),
    "raw": (CacheSpec(SideSpec("raw", 16), SideSpec("raw", 16), centre=False, seed=6), 2, 8, "float16"),
    "mse-3-dense": (CacheSpec(SideSpec("mse", 3, rotation="dense"), SideSpec("raw", 16), seed=7), 1, 12, "float16"),
    "qjl": (CacheSpec(SideSpec("qjl", 1), SideSpec("qjl", 1, sketch="orthogonal"), seed=8), 1, 32, "float32"),
    "prod": (CacheSpec(SideSpec("prod", 3), SideSpec("prod", 2, rotation="dense"), seed=9), 1, 32, "float32"),
    "polar": (
        CacheSpec(SideSpec("polar", 3.875), SideSpec("polar", 3.875, rotation="dense"), seed=10),
        1,
        48,
        "float32",
    ),
    "split": (
        CacheSpec(
            SideSpec("split", 2.5, rotation="dense"), SideSpec("split", 3.5), window=0, sinks=0, centre=False, seed=11
        ),
        2,
        64,
        "float32",
    ),
    "trellis-2-3": (
        CacheSpec(SideSpec("trellis", 2, "unbiased"), SideSpec("trellis", 3, "match"), seed=12),
        2,
        64,
        "float16",
    ),
    "trellis-2.5-1.5": (
        CacheSpec(SideSpec("trellis", 2.5, "unbiased"), SideSpec("trellis", 1.5, "least-squares"), sinks=70, seed=13),
        1,
        80,
        "float32",
    ),
    "trellis-3.5-4": (CacheSpec(SideSpec("trellis", 3.5), SideSpec("trellis", 4), sinks=0, seed=14), 1, 32, "float32"),
    "trellis-2-search-3": (
        CacheSpec(
            SideSpec("trellis", 2, "unbiased", search=3), SideSpec("trellis", 3.5, "least-squares", search=3), seed=16
        ),
        1,
        64,
        "float32",
    ),
    "computed-3-2": (
        CacheSpec(SideSpec("computed", 3, "unbiased"), SideSpec("computed", 2, "least-squares", search=3), seed=17),
        2,
        64,
        "float32",
    ),
    "trellis-1-96": (
        CacheSpec(SideSpec("trellis", 1, "match"), SideSpec("raw", 16), centre=False, seed=15),
        1,
        96,
        "float16",
    ),
}
LAYER = 5
DECODED_TOKENS = [0, 1, 64, 127]


def inputs(seed: int, side: int, heads: int, dim: int, dtype: str) -> NDArray[Any]:
    """Exact in every dtype used, [heads, 128, dim]: see "Test vectors" in FORMAT.md."""
    key = stream(seed, INPUT_PATH + side)
    bits = 20 if dtype == "float32" else 7
    words = [splitmix64((key + n) & (1 << 64) - 1) >> (64 - bits) for n in range(heads * PAGE_TOKENS * dim)]
    x = np.array(words, np.float64).reshape(heads, PAGE_TOKENS, dim) / 2.0 ** (bits - 3) - 4
    x += np.arange(dim) % 3
    return (x * 2.0 ** (np.arange(PAGE_TOKENS) % 5 - 2)[:, None]).astype(dtype)


def levels(side: SideSpec, dim: int) -> list[list[int]]:
    """Integer levels of each quantizer of a side, in the order of its code fields."""
    if side.codec in ("mse", "uniform"):
        books = [(side.codec, int(side.bits), dim)]
    elif side.codec == "prod" and side.bits > 1:
        books = [("mse", int(side.bits) - 1, dim)]
    elif side.codec in TRELLIS_CODECS:
        return [list(code(side.bits, side.codec).levels)]
    elif side.codec == "split":
        books = [("mse", b, d) for b, d in zip(split_bits(side.bits), split_dims(dim), strict=True)]
    else:
        books = []
    return [table(*book).levels.tolist() for book in books]


def named(spec: CacheSpec) -> dict[str, Any]:
    """The spec's fields that a page depends on; of sides without `basis`, which codec `tuned` alone has."""
    sides = ("key", "value")
    fields = {k: v for k, v in asdict(spec).items() if k not in ("states", "bits_by_layer")}
    return fields | {s: {k: v for k, v in fields[s].items() if k != "basis"} for s in sides}


def text(x: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()


def vector(name: str) -> dict[str, Any]:
    """One case as it is committed."""
    spec, heads, dim, dtype = CASES[name]
    k, v = (inputs(spec.seed, side, heads, dim, dtype) for side in (0, 1))
    states = reference.freeze(spec, LAYER, k.astype(np.float64), v.astype(np.float64))
    row = reference.fold(spec, LAYER, k, v, first_page=True, states=states)
    k_hat, v_hat = reference.unfold(spec, LAYER, row, k, states)
    return {
        "format": FORMAT_VERSION,
        "spec": named(spec),
        "layer": LAYER,
        "kv_heads": heads,
        "head_dim": dim,
        "dtype": dtype,
        "first_page": True,
        "state": [[None if s is None else s.tolist() for s in side] for side in states],
        "levels": [levels(side, dim) for side in (spec.key, spec.value)],
        "page": text(row),
        "decoded": {
            "tokens": DECODED_TOKENS,
            "keys": text(k_hat[:, DECODED_TOKENS].astype(np.float32)),
            "values": text(v_hat[:, DECODED_TOKENS].astype(np.float32)),
        },
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        (FOLDER / f"{name}.json").write_text(json.dumps(vector(name), indent=1) + "\n")


if __name__ == "__main__":
    main()
