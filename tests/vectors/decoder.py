"""A decoder of canonical pages written from FORMAT.md alone: the standard library and NumPy, nothing of kvfold."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

TOKENS = 128
MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def stream(seed: int, *path: int) -> int:
    key = splitmix64(seed)
    for step in path:
        key = splitmix64(key ^ splitmix64(step))
    return key


def word(key: int, n: int) -> int:
    return splitmix64((key + n) & MASK)


def gaussian(n: int, key: int) -> np.ndarray:
    out = []
    for i in range((n + 1) // 2):
        u1, u2 = ((word(key, 2 * i) >> 11) + 1) / 2**53, (word(key, 2 * i + 1) >> 11) / 2**53
        r = math.sqrt(-2 * math.log(u1))
        out += [r * math.cos(2 * math.pi * u2), r * math.sin(2 * math.pi * u2)]
    return np.array(out[:n])


def haar(dim: int, key: int) -> np.ndarray:
    q, r = np.linalg.qr(gaussian(dim * dim, key).reshape(dim, dim))
    return q * np.sign(np.diag(r))


def rotation(kind: str, dim: int, key: int) -> np.ndarray:
    if kind == "dense":
        return haar(dim, key)
    pow2 = dim & -dim
    m = dim // pow2
    r = np.empty((dim, dim))
    for i in range(dim):
        for j in range(dim):
            angle = 2 * math.pi * (i // pow2) * (j // pow2) / m
            hadamard = -1 if ((i % pow2) & (j % pow2)).bit_count() % 2 else 1
            sign = -1 if word(key, j // 64) >> (j % 64) & 1 else 1
            r[i, j] = (math.cos(angle) + math.sin(angle)) * hadamard * sign / math.sqrt(dim)
    return r


class Region:
    """One head's bytes, read from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def codes(self, bits: int, count: int) -> np.ndarray:
        out = np.zeros((TOKENS, count), int)
        shift = 0
        for width in (8, 4, 2, 1):
            if bits & width:
                row = -(-count * width // 8)
                plane = np.frombuffer(self.take(TOKENS * row), np.uint8).reshape(TOKENS, row)
                j = np.arange(count)
                field = plane[:, j * width // 8] >> (j * width % 8) & (1 << width) - 1
                out |= field.astype(int) << shift
                shift += width
        return out

    def floats(self, dtype: str, count: int) -> np.ndarray:
        n = TOKENS * count * np.dtype(dtype).itemsize
        return np.frombuffer(self.take(n), dtype).reshape(TOKENS, count).astype(float)


def scalar(region: Region, bits: int, levels: list[int], rotate: np.ndarray) -> np.ndarray:
    codes = region.codes(bits, len(rotate))
    return region.floats("<f2", 1) * np.array(levels)[codes] @ rotate


def sketch(region: Region, kind: str, dim: int, key: int) -> np.ndarray:
    signs = 2 * region.codes(1, dim) - 1
    own = stream(key, 1)
    if kind == "gaussian":
        s, c = gaussian(dim * dim, own).reshape(dim, dim), math.sqrt(math.pi / 2) / dim
    else:
        s, c = haar(dim, own), math.sqrt(math.pi) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2) / dim
    return c * region.floats("<f2", 1) * (signs @ s)


ANGLES = {
    2: [0.309756117, 0.63398024, 0.936816087, 1.26104021],
    3: [0.426249693, 0.674384998, 0.896411329, 1.14454663],
    4: [0.524214091, 0.705909406, 0.864886921, 1.04658224],
}


def polar(region: Region, dim: int, rotate: np.ndarray) -> np.ndarray:
    outer, inner = region.codes(4, dim // 2), region.codes(2, 7 * dim // 16)
    r = region.floats("<f2", dim // 16)
    first = {2: 0, 3: dim // 4, 4: dim // 4 + dim // 8}
    for level in (4, 3, 2):
        psi = np.array(ANGLES[level])[inner[:, first[level] : first[level] + r.shape[1]]]
        r = np.stack([r * np.cos(psi), r * np.sin(psi)], axis=-1).reshape(TOKENS, -1)
    theta = 2 * np.pi * (outer + 0.5) / 16
    return np.stack([r * np.cos(theta), r * np.sin(theta)], axis=-1).reshape(TOKENS, -1) @ rotate


# bits: new bits per step, parity masks per phase, start states
TRELLIS: dict[float, tuple[list, list, list]] = {
    1: ([1], [[77, 60, 42]], [0, 23, 37, 50]),
    1.5: ([1, 2], [[73, 26, 2, 102], [206, 85, 232, 116]], [0, 22, 39, 49]),
    2: ([2], [[74, 201, 36, 16]], [0, 24, 39, 63]),
    2.5: ([2, 3], [[102, 177, 8, 172, 64], [380, 226, 465, 16, 72]], [0, 7, 51, 52]),
    3: ([3], [[180, 282, 337, 32, 152, 16]], [4, 14, 33, 54]),
    3.5: ([3, 4], [[484, 282, 417, 48, 8, 440], [200, 148, 498, 801, 208, 736]], [0, 10, 39, 45]),
    4: ([4], [[920, 228, 594, 513, 48, 288]], [0, 15, 22, 25]),
}


COMPUTED: dict[float, tuple[list, list, list]] = {
    2: ([2], [[138, 69, 24, 4]], [12, 43, 47, 62]),
    3: ([3], [[292, 146, 73, 40, 16, 8]], [5, 23, 44, 59]),
}


def sums(bits: int) -> list[int]:
    """Levels of a computed code, by index."""
    top = (1 << bits) - 1
    return [3 * (2 * (i >> bits) - top) + 2 * (2 * (i & top) - top) for i in range(1 << 2 * bits)]


def trellis(region: Region, book: tuple[list, list, list], levels: list[int], rotate: np.ndarray) -> np.ndarray:
    widths, masks, starts = book
    dim, period = len(rotate), len(widths)
    symbols = np.empty((TOKENS, dim), int)
    for phase in range(period):
        symbols[:, phase::period] = region.codes(widths[phase], dim // period)
    header = region.codes(8, 1)[:, 0]
    unit = float(np.frombuffer(region.take(2), "<f2")[0])
    z = np.empty((TOKENS, dim))
    for token in range(TOKENS):
        register = starts[header[token] >> 6]
        for t in range(dim):
            width = widths[t % period]
            window = (register << width | int(symbols[token, t])) & (1 << width + 6) - 1
            index = 0
            for mask in masks[t % period]:
                index = index << 1 | (window & mask).bit_count() & 1
            z[token, t] = levels[index]
            register = window & 63
    return unit * (header & 63)[:, None] * z @ rotate


def side(region: Region, spec: dict[str, Any], dim: int, key: int, dtype: str, levels: list, state: Any) -> np.ndarray:
    """x_hat [128, dim] of keys (still centred) or values."""
    bits, kind = int(spec["bits"]), spec["rotation"]
    if spec["codec"] == "raw":
        return region.floats(dtype, dim)
    if spec["codec"] in ("mse", "uniform"):
        return scalar(region, bits, levels[0], rotation(kind, dim, key))
    if spec["codec"] == "qjl" or (spec["codec"] == "prod" and bits == 1):
        return sketch(region, spec["sketch"], dim, key)
    if spec["codec"] == "prod":
        return scalar(region, bits - 1, levels[0], rotation(kind, dim, key)) + sketch(region, spec["sketch"], dim, key)
    if spec["codec"] == "polar":
        return polar(region, dim, rotation(kind, dim, key))
    if spec["codec"] == "trellis":
        return trellis(region, TRELLIS[spec["bits"]], levels[0], rotation(kind, dim, key))
    if spec["codec"] == "computed":
        return trellis(region, COMPUTED[bits], sums(bits), rotation(kind, dim, key))
    outlier, regular = state, sorted(set(range(dim)) - set(state))
    x = np.empty((TOKENS, dim))
    x[:, outlier] = scalar(region, bits + 1, levels[0], rotation(kind, len(outlier), stream(key, 2)))
    x[:, regular] = scalar(region, bits, levels[1], rotation(kind, len(regular), stream(key, 3)))
    return x


def decode(vector: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [kv_heads, 128, head_dim] of a test vector's page."""
    spec, heads, dim = vector["spec"], vector["kv_heads"], vector["head_dim"]
    page = base64.b64decode(vector["page"])
    dtype = {"float32": "<f4", "float16": "<f2"}[vector["dtype"]]
    out: tuple[list, list] = ([], [])
    size = len(page) // heads
    for h in range(heads):
        region = Region(page[h * size : (h + 1) * size])
        for i, name in enumerate(("key", "value")):
            key = stream(spec["seed"], vector["layer"], h, i)
            out[i].append(side(region, spec[name], dim, key, dtype, vector["levels"][i], vector["state"][i][h]))
        if spec["centre"]:
            codes = np.frombuffer(region.take(2 * dim), np.int8).reshape(2, dim)
            scales = np.frombuffer(region.take(4), "<f2").astype(float)
            out[0][-1] = out[0][-1] + np.repeat(codes * scales[:, None], TOKENS // 2, axis=0)
        rest = region.take(size)
        if len(rest) >= 8 or any(rest):
            raise ValueError(f"head {h} does not end with fewer than eight zero bytes")
    return np.stack(out[0]), np.stack(out[1])
