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
    """Of the safetensors files in a folder that transformers would load, None if there are none."""
    total = parameters = 0
    packed = False
    files = _files(folder)
    for file in files:
        for name, tensor in _header(file).items():
            if name == "__metadata__":
                continue
            start, stop = tensor["data_offsets"]
            total += stop - start
            parameters += math.prod(tensor["shape"])
            packed |= tensor["dtype"] not in FLOATS
    return Weights(total, None if packed else parameters) if files else None


def _files(folder: Path) -> list[Path]:
    """The one file, those that the index names, or all there are. Folders may hold the same weights a second time in another
    layout, and adapters."""
    if (one := folder / "model.safetensors").is_file():
        return [one]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        files = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weights", "Check that the download is complete") from error
    if missing := [x.name for x in files if not x.is_file()]:
        raise ModelError(f"{folder} lacks {missing[0]}, which its index names", "Check that the download is complete")
    return files


def _header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length <= size - 8:
            try:
                header = dict(json.loads(f.read(length)))
                stop = max((x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"), default=0)
            except (ValueError, TypeError, KeyError, IndexError):
                pass
            else:
                if 8 + length + stop <= size:
                    return header
                raise ModelError(f"{file} is cut short", "Check that the download is complete")
    raise ModelError(f"{file} is not a safetensors file", "Check that the download is complete")


def of_gguf(file: Path) -> tuple[dict[str, Any], Weights]:
    """(metadata, weights) of a GGUF file. Raises MissingExtra without the package gguf."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingExtra.of(f"reading {file.name}", "gguf", "gguf") from error
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{file} is not a GGUF file ({error})", "Check that the download is complete") from error
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    parameters = sum(int(t.n_elements) for t in reader.tensors)
    return metadata, Weights(sum(int(t.n_bytes) for t in reader.tensors), parameters)
