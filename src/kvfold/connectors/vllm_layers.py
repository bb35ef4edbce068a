"""Folded layers of a vLLM worker and their files: which there are, where their pages lie, whose they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvfold.adapters.vllm import chosen_spec
from kvfold.adapters.vllm.blocks import ExactSpec
from kvfold.adapters.vllm.layer import PooledLayer
from kvfold.config import PAGE_TOKENS
from kvfold.connectors.prefixes import Piece
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import LayerShape
from kvfold.errors import Unsupported
from kvfold.packing.layout import FORMAT_VERSION
from kvfold.sessions.files import digest
from kvfold.sessions.fingerprint import SAMPLE_BYTES, SAMPLES, lasting
from kvfold.sessions.manifest import Layer

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


@dataclass(frozen=True)
class Held:
    """Blocks of a request, by group."""

    blocks: tuple[list[int], ...]


@dataclass
class StoredLayer:
    """One folded layer. page_group, exact_group: numbers of its groups of blocks. kept: what files say of it."""

    name: str
    page_group: int
    exact_group: int
    kept: Layer
    config: VllmConfig

    @cached_property
    def pooled(self) -> PooledLayer:
        """In a worker, once it has memory."""
        layer = self.config.compilation_config.static_forward_context[self.name]
        return layer.impl.pooled(layer.kv_cache)

    def _rows(self, first: int, stop: int, held: Held) -> list[Tensor]:
        """The bytes of pages first .. stop - 1 of a request, views."""
        memory, blocks = self.pooled.memory, held.blocks[self.page_group]
        per_block = memory.pages.shape[1]
        return [memory.pages[blocks[p // per_block], p % per_block] for p in range(first, stop)]

    def pages(self, first: int, stop: int, held: Held) -> Tensor:
        """Pages in canonical bytes, uint8 [n, page_bytes] on the CPU."""
        return torch.stack([self.pooled.engine.to_canonical(row).cpu() for row in self._rows(first, stop, held)])

    def sinks(self, held: Held) -> dict[str, Tensor]:
        """The exact first tokens of a request."""
        return self._exact(0, chosen_spec().sinks, held, "sink")

    def window(self, end: int, held: Held) -> dict[str, Tensor]:
        """The exact tokens that a request of `end` tokens, a multiple of a page, reads; none if some are not in memory."""
        start = max(0, end - chosen_spec().window) // PAGE_TOKENS * PAGE_TOKENS
        return self._exact(start, end, held, "exact")

    def _exact(self, start: int, stop: int, held: Held, name: str) -> dict[str, Tensor]:
        """Tokens start .. stop - 1; start begins a block."""
        size = self.pooled.memory.exact.shape[2]
        blocks = held.blocks[self.exact_group][start // size : -(-stop // size)]
        if start == stop or 0 in blocks:
            return {}
        keys, values = self.pooled.memory.tokens(torch.tensor(blocks, dtype=torch.int32).numpy(), stop - start)
        return {f"{name}_keys": keys.cpu().contiguous(), f"{name}_values": values.cpu().contiguous()}

    def load(self, pieces: list[Piece], local: int, held: Held) -> None:
        """Fill a request's blocks with what files know of it beyond its first `local` tokens."""
        end, layer = pieces[-1].tokens, extract_layer_index(self.name)
        rows = iter(self._rows(0, end // PAGE_TOKENS, held))
        for piece in pieces:
            for i, page in enumerate(_pages(piece, layer)):
                row = next(rows)
                if piece.first + i >= local // PAGE_TOKENS:
                    row.copy_(self.pooled.engine.from_canonical(page.to(row.device)))
        self._fill_exact(pieces, layer, local, held)

    def _fill_exact(self, pieces: list[Piece], layer: int, local: int, held: Held) -> None:
        """Exact tokens of a request as files have them, or else as its pages decode."""
        end, size = pieces[-1].tokens, self.pooled.memory.exact.shape[2]
        blocks = held.blocks[self.exact_group][: end // size]
        first = pieces[0].file.rest(layer)
        if local == 0 and "sink_keys" in first:
            self._write(blocks[0], first["sink_keys"], first["sink_values"])
        for page in range(local // PAGE_TOKENS, end // PAGE_TOKENS):
            start = page * PAGE_TOKENS // size
            mine = blocks[start : start + PAGE_TOKENS // size]
            if any(mine[page == 0 :]):
                row = self._rows(page, page + 1, held)[0]
                self._write_tokens(mine, *self.pooled.engine.unfold(row[None], (None, None)), skip=page == 0)
        last = pieces[-1].file.rest(layer)
        if pieces[-1].whole and "exact_keys" in last:
            keys, values = last["exact_keys"], last["exact_values"]
            self._write_tokens(blocks[(end - keys.shape[1]) // size :], keys, values, skip=False)

    def _write_tokens(self, blocks: list[int], keys: Tensor, values: Tensor, skip: bool) -> None:
        """keys, values [H, n, D] into consecutive blocks, null ones and, if told to, the first left out."""
        size = self.pooled.memory.exact.shape[2]
        for i, block in enumerate(blocks):
            if block and not (skip and i == 0):
                at = slice(i * size, (i + 1) * size)
                self._write(block, keys[:, at], values[:, at])

    def _write(self, block: int, keys: Tensor, values: Tensor) -> None:
        exact = self.pooled.memory.exact
        exact[block, :, : keys.shape[1]] = torch.cat([keys, values], -1).to(exact)


def _pages(piece: Piece, layer: int) -> Iterator[Tensor]:
    """The whole pages of a piece, canonical."""
    rows: list[Tensor] = []
    piece.file.pages(layer, lambda row, known: rows.append(row))
    yield from rows[: piece.pages]


def stored_layers(cache: KVCacheConfig, config: VllmConfig) -> list[StoredLayer]:
    """The folded layers in the model's order. Raises Unsupported if there are layers of another kind, whose state is not kept."""
    group = {name: i for i, g in enumerate(cache.kv_cache_groups) for name in g.layer_names}
    specs = {name: cache.kv_cache_groups[i].kv_cache_spec for name, i in group.items()}
    names = sorted((n for n, s in specs.items() if not isinstance(s, ExactSpec)), key=extract_layer_index)
    layers = []
    for i, name in enumerate(names):
        spec, exact = specs[name], group.get(f"{name}.exact")
        if exact is None or extract_layer_index(name) != i:
            raise Unsupported(
                f"{name} is not folded; the connector keeps models whose layers all are",
                "Run this model without --kv-transfer-config",
            )
        shape = LayerShape(i, spec.num_kv_heads, spec.head_size, spec.dtype.itemsize)
        size = TorchEngine(chosen_spec(), shape, spec.dtype, torch.device("cpu")).page_bytes
        dtype = str(spec.dtype).removeprefix("torch.")
        kept = Layer("folded", spec.num_kv_heads, spec.head_size, dtype, size)
        layers.append(StoredLayer(name, group[name], exact, kept, config))
    return layers


def model_key(config: VllmConfig) -> str:
    """Digest of what pages depend on: the model's config, samples of its weight files, dtype, profile, page format."""
    model = config.model_config
    known: dict[str, Any] = {
        "config": lasting(json.loads(model.hf_config.to_json_string(use_diff=False))),
        "weights": _weights(Path(model.model)) or [model.model, model.revision],
        "quantization": str(model.quantization),
        "dtype": str(model.dtype),
        "spec": asdict(chosen_spec()),
        "format": FORMAT_VERSION,
    }
    return digest(json.dumps(known, sort_keys=True, default=str).encode())


def _weights(folder: Path) -> list[Any]:
    """[name, size, digest of SAMPLES pieces] of the weight files of a model's folder."""
    found = []
    for path in sorted(p for pattern in WEIGHTS for p in folder.glob(pattern)):
        size, piece = path.stat().st_size, SAMPLE_BYTES // SAMPLES
        with path.open("rb") as file:
            parts = []
            for i in range(SAMPLES):
                file.seek(max(0, size - piece) * i // (SAMPLES - 1))
                parts.append(file.read(piece))
        found.append([path.name, size, digest(*parts)])
    return found
