"""Bytes and parameters of weight files, read from their headers: safetensors folders and GGUF files."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.errors import MissingExtra, ModelError

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Weights:
    """bytes: what the tensors take as stored. parameters: how many numbers they are; None if they are packed codes."""

    bytes: int
    parameters: int | None


def of_folder(folder: Path) -> Weights | None:
    """Of the safetensors files in a folder, None if there are none."""
    total = parameters = 0
    packed = False
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        for name, tensor in _header(file).items():
            if name == "__metadata__":
                continue
            start, stop = tensor["data_offsets"]
            total += stop - start
            parameters += math.prod(tensor["shape"])
            packed |= tensor["dtype"] not in FLOATS
    return Weights(total, None if packed else parameters) if files else None


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as f:
        start = f.read(8)
        if len(start) == 8:
            raw = f.read(struct.unpack("<Q", start)[0])
            try:
                return dict(json.loads(raw))
            except ValueError:
                pass
    raise ModelError(f"{file} is not a safetensors file", "Check that the download is complete")


def of_gguf(file: Path) -> tuple[dict[str, Any], Weights]:
    """(metadata, weights) of a GGUF file. Raises MissingExtra without the package gguf."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingExtra.of(f"reading {file.name}", "gguf", "gguf") from error
    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise ModelError(f"{file} is not a GGUF file ({error})", "Check that the download is complete") from error
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    parameters = sum(int(t.n_elements) for t in reader.tensors)
    return metadata, Weights(sum(int(t.n_bytes) for t in reader.tensors), parameters)
