"""llama.cpp's saved states and files of folded pages: whole pages folded, the first tokens and the newest exact.

A file is safetensors. `layers.<i>.pages` are canonical pages (FORMAT.md), `layers.<i>.sinks` and `layers.<i>.recent` the bits
of exact keys and values, [2, tokens, numbers]; `before` is what the state holds before its numbers, deflated. The metadata has
the layout of these, the cache's spec and a digest of everything.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.adapters.llama_cpp import state as llama
from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import LayerShape
from kvfold.errors import DamagedSession, ShapeMismatch, Unsupported, WrongVersion
from kvfold.packing.layout import FORMAT_VERSION
from kvfold.planner.model import Model

VERSION = 1
STATE = (None, None)
NOTHING = torch.empty(1, 0, 1), torch.empty(1, 0, 1)
KIND = "llama.cpp state"


@dataclass(frozen=True)
class Heads:
    """KV heads of one cached layer and the numbers of each."""

    kv_heads: int
    head_dim: int


def heads_of(model: Model) -> list[Heads]:
    """What llama.cpp caches of a model. Raises Unsupported for models with layers of another kind."""
    kinds = {layer.kind for layer in model.layers}
    if kinds != {"full"}:
        raise Unsupported(
            f"a state of layers of the kinds {sorted(kinds)} is not read",
            "Only models whose layers all are full attention",
        )
    return [Heads(x.attention.kv_heads, x.attention.key_dim) for x in model.layers if x.attention is not None]


def fold(data: bytes, heads: Sequence[Heads], spec: CacheSpec, out: Path) -> None:
    """Write the state `data` to the file `out`, folded. heads: of every layer that llama.cpp caches, in order.

    Raises Unsupported for a state that `state.parse` refuses, ShapeMismatch if it is not of such a model, NonFiniteInput.
    """
    if any(side.codec == "split" for side in (spec.key, spec.value)):
        raise Unsupported("codec 'split' keeps a state per sequence", "Choose another profile")
    found = llama.parse(data)
    _check(found, heads)
    pages = max(0, found.cells - spec.window) // PAGE_TOKENS
    sinks, recent = slice(0, min(spec.sinks, pages * PAGE_TOKENS)), slice(pages * PAGE_TOKENS, found.cells)
    tensors = {"before": torch.frombuffer(bytearray(zlib.compress(found.before)), dtype=torch.uint8)}
    for i, (h, k, v) in enumerate(zip(heads, found.keys, found.values, strict=True)):
        engine = _engine(spec.for_layer(i, len(heads)), i, h, k)
        rows = torch.zeros(pages, engine.page_bytes, dtype=torch.uint8)
        if pages:
            keys, values = (_paged(x, h, pages) for x in (k, v))
            engine.fold(keys, values, True, list(rows), STATE)
        tensors |= {
            f"layers.{i}.pages": rows,
            f"layers.{i}.sinks": _bits(k, v, sinks),
            f"layers.{i}.recent": _bits(k, v, recent),
        }
    about = {
        "kvfold": KIND,
        "version": str(VERSION),
        "page_version": str(FORMAT_VERSION),
        "spec": json.dumps(asdict(spec)),
        "heads": json.dumps([asdict(h) for h in heads]),
        "kinds": json.dumps([[k.kind, v.kind] for k, v in zip(found.keys, found.values, strict=True)]),
        "transposed": json.dumps(found.transposed),
        "after": found.after.hex(),
    }
    save_file(tensors, out, about | {"xxh3_128": _digest(tensors, about)})


def unfold(path: Path) -> bytes:
    """The state in the file `path`, for llama.cpp: exact tokens as they were, others as their pages decode.

    Raises WrongVersion for files of another kvfold or another program, DamagedSession.
    """
    about, tensors = _read(path)
    spec = json.loads(about["spec"])
    spec = CacheSpec(key=SideSpec(**spec.pop("key")), value=SideSpec(**spec.pop("value")), **spec)
    keys: list[llama.Matrix] = []
    values: list[llama.Matrix] = []
    shapes = json.loads(about["heads"])
    for i, (shape, kinds) in enumerate(zip(shapes, json.loads(about["kinds"]), strict=True)):
        own = {name: tensors[f"layers.{i}.{name}"] for name in ("pages", "sinks", "recent")}
        h, sides = Heads(**shape), (keys, values)
        empty = [llama.Matrix(kind, own["recent"][0].numpy()) for kind in kinds]
        engine = _engine(spec.for_layer(i, len(shapes)), i, h, empty[0])
        decoded = engine.unfold(own["pages"], STATE) if len(own["pages"]) else NOTHING
        for side, matrix, x in zip((0, 1), empty, decoded, strict=True):
            sides[side].append(_joined(matrix, x, own["sinks"][side], own["recent"][side]))
    before = zlib.decompress(tensors["before"].numpy().tobytes())
    transposed, after = json.loads(about["transposed"]), bytes.fromhex(about["after"])
    return llama.SlotState(before, len(keys[0].raw), transposed, keys, values, after).to_bytes()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedSession.at(f"{path} is not a whole file ({error})", 0) from error
    if about.get("kvfold") != KIND:
        raise WrongVersion(f"{path} is not a folded llama.cpp state", "Give a file that was written by `fold`")
    versions = about.get("version"), about.get("page_version")
    if versions != (str(VERSION), str(FORMAT_VERSION)):
        raise WrongVersion(
            f"{path} has versions {versions}, {(str(VERSION), str(FORMAT_VERSION))} are known", "Upgrade kvfold"
        )
    if about.pop("xxh3_128", "") != _digest(tensors, about):
        raise DamagedSession.at(f"{path} does not agree with its checksum", 0)
    return about, tensors


def _digest(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    h = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        h.update(f"{name} {list(x.shape)}".encode())
        h.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _check(found: llama.SlotState, heads: Sequence[Heads]) -> None:
    """Raise ShapeMismatch unless the state is of layers like these."""
    there = [(k.raw.shape[1], v.raw.shape[1]) for k, v in zip(found.keys, found.values, strict=True)]
    if there != [(h.kv_heads * h.head_dim,) * 2 for h in heads]:
        raise ShapeMismatch(
            f"the state has keys and values of {there} numbers, the model's layers {[asdict(h) for h in heads]}",
            "Give the model that llama.cpp ran",
        )


def _engine(spec: CacheSpec, layer: int, h: Heads, like: llama.Matrix) -> TorchEngine:
    shape = LayerShape(layer, h.kv_heads, h.head_dim, like.raw.itemsize)
    return TorchEngine(spec, shape, getattr(torch, like.dtype), torch.device("cpu"))


def _signed(raw: NDArray[Any]) -> Tensor:
    """Bits as a type that torch has everything for."""
    return torch.from_numpy(np.ascontiguousarray(raw).view(f"<i{raw.itemsize}").copy())


def _paged(x: llama.Matrix, h: Heads, pages: int) -> Tensor:
    """The first pages, [P, H, 128, D]."""
    numbers = _signed(x.raw[: pages * PAGE_TOKENS]).view(getattr(torch, x.dtype))
    return numbers.view(pages, PAGE_TOKENS, h.kv_heads, h.head_dim).transpose(1, 2)


def _bits(k: llama.Matrix, v: llama.Matrix, tokens: slice) -> Tensor:
    return torch.stack([_signed(k.raw[tokens]), _signed(v.raw[tokens])])


def _joined(like: llama.Matrix, decoded: Tensor, sinks: Tensor, recent: Tensor) -> llama.Matrix:
    """decoded: float32 [H, n, D]; its first tokens are replaced by the exact ones."""
    dtype = getattr(torch, like.dtype)
    folded = decoded.to(dtype).transpose(0, 1).flatten(1).contiguous().view(recent.dtype)
    rows = torch.cat([sinks, folded[len(sinks) :].view(-1, recent.shape[1]), recent]).numpy()
    return llama.Matrix(like.kind, rows.view(f"<u{rows.itemsize}"))
