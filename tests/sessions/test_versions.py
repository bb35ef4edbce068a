"""Sessions that older versions wrote keep loading: tests/vectors/session-N is one of format version N."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import version_1
from safetensors.numpy import load_file
from talk import continuation, page_bytes, same

from kvfold.packing.layout import FORMAT_VERSION
from kvfold.sessions import archive, files
from kvfold.sessions.manifest import NAME, SESSION_VERSION, Manifest
from kvfold.sessions.session import Session


def test_there_is_a_vector_of_every_version() -> None:
    assert SESSION_VERSION == 1
    assert FORMAT_VERSION == 1
    assert Manifest.read(version_1.FOLDER).version == 1


def test_version_1_loads_and_goes_on() -> None:
    assert archive.verify(version_1.FOLDER)["whole"]
    s = Session.load(version_1.FOLDER, version_1.model())
    assert (s.tokens, s.sampler, s.notes) == (version_1.TOKENS, version_1.SAMPLER, version_1.NOTES)
    assert s.runner.spec == version_1.SPEC
    assert list(s.checkpoints) == [version_1.CHECKPOINT]
    made = Manifest.read(version_1.FOLDER)
    stored = load_file(version_1.FOLDER / made.segments[0].file)["layers.1.pages"]
    assert [b"".join(layer) for layer in page_bytes(s.cache)] == [stored.tobytes()]
    # It continues like one that was never saved, up to the rounding of another machine.
    fresh = version_1.session()
    got, want = continuation(s, 60), continuation(fresh, 60)
    assert torch.allclose(got, want, rtol=1e-2, atol=1e-2)


def test_version_1_is_written_as_it_was(tmp_path: Path) -> None:
    """What is loaded and saved again has the same bytes, file by file."""
    s = Session.load(version_1.FOLDER, version_1.model())
    shutil.copytree(version_1.FOLDER, tmp_path / "a")
    s.save(tmp_path / "b")
    theirs, mine = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir() if p.name != NAME} for x in "ab")
    assert mine == theirs
    again = Session.load(tmp_path / "b", version_1.model())
    assert same(again, s)


def test_the_format_page_is_enough_to_read_one() -> None:
    """Written from FORMAT.md: seals, digests, tokens, and where sinks and exact tokens are."""
    line, seal = (version_1.FOLDER / NAME).read_bytes().splitlines()
    assert json.loads(seal) == {"xxh3_128": files.digest(line)}
    made = json.loads(line)
    (segment,) = made["segments"]
    state = made["state"]
    assert files.digest((version_1.FOLDER / state["file"]).read_bytes()) == state["digest"]
    page_file, state_file = (load_file(version_1.FOLDER / name) for name in (segment["file"], state["file"]))
    kinds = {"int32": "int32", "uint8": "uint8", "float32": "float32"}
    index = b"".join(
        f"{name} {kinds[x.dtype.name]} {list(x.shape)}\n".encode() + x.tobytes()
        for name, x in sorted(page_file.items())
        if not name.endswith(".pages")
    )
    assert files.digest(index) == segment["index"]
    for row, checksum in zip(page_file["layers.1.pages"], page_file["layers.1.checksums"], strict=True):
        assert files.digest(row.tobytes()) == checksum.tobytes().hex()
    tokens = page_file["tokens"][: state["folded"] // 128 * 128].tolist() + state_file["tokens"].tolist()
    assert tokens == version_1.TOKENS
    assert len(tokens) == state["length"]
    assert page_file["layers.1.sink_keys"].shape == (1, 4, 16)
    exact = state_file["layers.1.keys"]
    assert exact.shape[0::2] == (1, 16)
    assert state["length"] - state["folded"] <= exact.shape[1] <= 20 + 2 * 128
    assert state_file["layers.0.conv_states.0"].shape == (1, 32, 4)
    assert state_file["layers.0.recurrent_states.0"].shape == (1, 2, 8, 8)


@pytest.mark.parametrize("where", ["pages", "state"])
def test_a_changed_vector_is_noticed(where: str, tmp_path: Path) -> None:
    shutil.copytree(version_1.FOLDER, tmp_path / "a")
    path = next((tmp_path / "a").glob(f"{where}*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="damaged"):
        Session.load(tmp_path / "a", version_1.model())
