"""Committed pages: old bytes must load for ever, every encoder writes them again, FORMAT.md alone is enough to read them."""

from __future__ import annotations

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any

import decoder
import numpy as np
import pytest

from kvfold.codebook import angles, table, trellis
from kvfold.config import CODEC_BITS, TRELLIS_CODECS, CacheSpec, SideSpec
from kvfold.engine import reference
from kvfold.packing.layout import FORMAT_VERSION

torch = pytest.importorskip("torch")

from kvfold.engine.on_torch import TorchEngine  # noqa: E402
from kvfold.engine.request import LayerShape  # noqa: E402

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
NAMES = sorted(f.stem for f in FOLDER.glob("*.json"))
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_vectors.py"))


@pytest.fixture(params=NAMES)
def vector(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((FOLDER / f"{request.param}.json").read_text())


def spec_of(vector: dict[str, Any]) -> CacheSpec:
    fields = dict(vector["spec"])
    return CacheSpec(SideSpec(**fields.pop("key")), SideSpec(**fields.pop("value")), **fields)


def page_of(vector: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(vector["page"]), np.uint8)


def states_of(vector: dict[str, Any]) -> tuple[list, list]:
    key, value = ([None if s is None else np.array(s, np.int16) for s in side] for side in vector["state"])
    return key, value


def decoded_of(vector: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    shape = (vector["kv_heads"], len(vector["decoded"]["tokens"]), vector["head_dim"])
    keys, values = (
        np.frombuffer(base64.b64decode(vector["decoded"][side]), np.float32).reshape(shape)
        for side in ("keys", "values")
    )
    return keys, values


def assert_decodes(vector: dict[str, Any], keys: np.ndarray, values: np.ndarray, rtol: float) -> None:
    for got, expected in zip((keys, values), decoded_of(vector), strict=True):
        np.testing.assert_allclose(got[:, vector["decoded"]["tokens"]], expected, atol=rtol * abs(expected).max())


def test_every_case_is_committed() -> None:
    assert sorted(SCRIPT["CASES"]) == NAMES


def test_a_decoder_written_from_the_format_reads_the_page(vector: dict[str, Any]) -> None:
    assert vector["format"] == FORMAT_VERSION
    assert_decodes(vector, *decoder.decode(vector), rtol=1e-6)


def test_numpy_writes_the_page_and_reads_it(vector: dict[str, Any]) -> None:
    name = next(n for n in NAMES if json.loads((FOLDER / f"{n}.json").read_text()) == vector)
    again = SCRIPT["vector"](name)
    assert {k: again[k] for k in again if k != "decoded"} == {k: vector[k] for k in vector if k != "decoded"}
    like = np.zeros((vector["kv_heads"], 1, vector["head_dim"]), vector["dtype"])
    k_hat, v_hat = reference.unfold(spec_of(vector), vector["layer"], page_of(vector), like, states_of(vector))
    assert_decodes(vector, k_hat, v_hat, rtol=1e-6)


def test_torch_reads_the_page_and_writes_it_again(vector: dict[str, Any]) -> None:
    spec, heads, dim, dtype = spec_of(vector), vector["kv_heads"], vector["head_dim"], vector["dtype"]
    engine = TorchEngine(spec, LayerShape(vector["layer"], heads, dim, 4), getattr(torch, dtype), torch.device("cpu"))
    state = tuple(None if s[0] is None else torch.tensor(s, dtype=torch.int16) for s in vector["state"])
    page = torch.from_numpy(page_of(vector).copy())
    k_hat, v_hat = engine.unfold(page[None], state)
    assert_decodes(vector, k_hat.numpy(), v_hat.numpy(), rtol=2e-6)
    k, v = (torch.from_numpy(SCRIPT["inputs"](spec.seed, side, heads, dim, dtype))[None] for side in (0, 1))
    row = torch.zeros_like(page)
    engine.fold(k, v, vector["first_page"], [row], state)
    differing = int((row != page).sum())
    canonical = all(
        s.codec in ("raw", *TRELLIS_CODECS) or (s.codec in ("mse", "uniform") and s.rotation == "hadamard")
        for s in (spec.key, spec.value)
    )
    # Outside the canonical codecs float32 may round a scale, or a value on a boundary, the other way.
    assert differing == 0 if canonical else differing <= 8


def test_levels_in_the_vectors_are_the_codebooks(vector: dict[str, Any]) -> None:
    spec = spec_of(vector)
    assert vector["levels"] == [SCRIPT["levels"](side, vector["head_dim"]) for side in (spec.key, spec.value)]


def test_format_prints_the_tables_that_are_used() -> None:
    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8")
    assert f"version {FORMAT_VERSION}" in text
    rows = re.findall(r"^\| `(mse|uniform)` \| (\d) \| ([-\d ]+) \|$", text, re.M)
    assert len(rows) == 5
    for codec, bits, levels in rows:
        for dim in (64, 80, 96, 112, 128, 256):
            half = table(codec, int(bits), dim).levels[1 << int(bits) - 1 :]
            assert [int(n) for n in levels.split()] == half.tolist()
    steps = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert [int(row[0]) for row in steps] == [64, 80, 96, 112, 128, 256]
    columns = [("mse", 1), ("mse", 2), ("mse", 3), ("mse", 4), ("uniform", 2)]
    for dim, *numbers in steps:
        for (codec, bits), number in zip(columns, numbers, strict=True):
            assert np.float32(float(number)) == table(codec, bits, int(dim)).step
    for level in (2, 3, 4):
        row = re.search(rf"^\| {level} \| ([\d., ]+) \|$", text, re.M)
        assert row is not None
        assert [float(n) for n in row[1].split(",")] == angles.solve(level, 2)[0].tolist() == decoder.ANGLES[level]


def test_format_prints_the_trellis_codes() -> None:
    text = (ROOT / "FORMAT.md").read_text(encoding="utf-8")
    row = r"^\| ([\d.]+) \| ([\d ]+) \| ([\d ·]+) \| ([-\d ]+) \| ([\d.]+) \| (\d+) \| ([\d ]+) \|$"
    rows = re.findall(row, text, re.M)
    assert [float(r[0]) for r in rows] == list(CODEC_BITS["trellis"])
    for bits, widths, masks, half, step, grid, starts in rows:
        book = trellis.code(float(bits))
        assert [int(n) for n in half.split()] == list(book.levels[len(book.levels) // 2 :])
        assert (float(step), int(grid)) == (book.step, book.grid)
        printed = (
            [int(n) for n in widths.split()],
            [[int(n) for n in m.split()] for m in masks.split("·")],
            [int(n) for n in starts.split()],
        )
        assert printed == (list(book.widths), [list(m) for m in book.masks], list(book.starts))
        assert printed == decoder.TRELLIS[float(bits)]
    row = r"^\| (\d) \| (\d) \| ([\d ]+) \| ([\d.]+) \| (\d+) \| ([\d ]+) \|$"
    rows = re.findall(row, text, re.M)
    assert [float(r[0]) for r in rows] == list(CODEC_BITS["computed"])
    for bits, width, masks, step, grid, starts in rows:
        book = trellis.code(float(bits), "computed")
        printed = ([int(width)], [[int(n) for n in masks.split()]], [int(n) for n in starts.split()])
        assert printed == (list(book.widths), [list(m) for m in book.masks], list(book.starts))
        assert (float(step), int(grid)) == (book.step, book.grid)
        assert printed == decoder.COMPUTED[int(bits)]
        assert decoder.sums(int(bits)) == list(book.levels)
