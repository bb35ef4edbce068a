"""llama.cpp's saved states: parsed byte for byte, refused where unknown, and, where llama.cpp is there, restored by it."""

from __future__ import annotations

import ctypes
import json
import struct
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvfold import profiles
from kvfold.adapters.llama_cpp import folding, state
from kvfold.errors import DamagedSession, ShapeMismatch, Unsupported

MODEL = Path(str(resources.files("kvfold.models").joinpath("recall-llama-12m")))
HEADS = [folding.Heads(2, 64)] * 2


def blob(cells: int, transposed: bool = False, streams: int = 1, kind: int = 1) -> bytes:
    """A state of two layers as llama_kv_cache::state_write lays it out, of float16 numbers."""
    rng = np.random.default_rng(cells)
    width = HEADS[0].kv_heads * HEADS[0].head_dim
    data = [rng.standard_normal((cells, width)).astype(np.float16).tobytes() for _ in range(4)]
    by_cell = struct.pack("<iQ", kind, 2 * width)
    by_number = struct.pack("<iII", kind, 2, width)
    parts = [struct.pack("<IiII", state.BLOB_MAGIC, 0, streams, cells)]
    parts += [struct.pack("<iIi", i, 1, 0) for i in range(cells)]
    parts += [struct.pack("<II", transposed, 2), by_cell, data[0], by_cell, data[1]]
    for x in data[2:]:
        parts += [by_number if transposed else by_cell, x]
    return b"".join([*parts, bytes(4 * (streams - 1))])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cells", [50, 700])
def test_lossless_gives_back_every_byte(cells: int, transposed: bool, tmp_path: Path) -> None:
    data = blob(cells, transposed, streams=3)
    assert state.parse(data).to_bytes() == data
    folding.fold(data, HEADS, profiles.load("lossless").spec, tmp_path / "x")
    assert folding.unfold(tmp_path / "x") == data


@pytest.mark.parametrize("transposed", [False, True])
def test_folded_numbers_are_near_and_the_newest_exact(transposed: bool, tmp_path: Path) -> None:
    data, spec = blob(700, transposed), profiles.load("balanced").spec
    folding.fold(data, HEADS, spec, tmp_path / "x")
    was, now = state.parse(data), state.parse(folding.unfold(tmp_path / "x"))
    assert now.before == was.before
    for old, new in zip(was.keys + was.values, now.keys + now.values, strict=True):
        a, b = (np.ascontiguousarray(x.raw).view(np.float16).astype(np.float64) for x in (old, new))
        exact = np.r_[: spec.sinks, 512:700]
        assert (a[exact] == b[exact]).all()
        assert 0.001 < np.square(a - b)[spec.sinks : 512].mean() / np.square(a).mean() < 0.06


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("<III", state.FILE_MAGIC, 4, 0), "version 4"),
        (b"GGUF" + bytes(40), "begins with"),
        (blob(5, kind=8), "GGML type 8"),
        (blob(5)[:-1], "ends early"),
        (blob(5) + bytes(4), "after the values"),
        (struct.pack("<IiII", state.BLOB_MAGIC, 0, 1, 0), "without tokens"),
    ],
)
def test_what_is_not_known_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        state.parse(data)


def test_another_model_and_damage(tmp_path: Path) -> None:
    spec = profiles.load("balanced").spec
    with pytest.raises(ShapeMismatch):
        folding.fold(blob(5), [folding.Heads(2, 128)] * 2, spec, tmp_path / "x")
    folding.fold(blob(200), HEADS, spec, tmp_path / "x")
    content = bytearray((tmp_path / "x").read_bytes())
    content[-100] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DamagedSession):
        folding.unfold(tmp_path / "x")


def write_gguf(path: Path) -> None:
    """The shipped model in float16, its rotary halves interleaved as llama.cpp has them."""
    import gguf
    import torch
    from safetensors.torch import load_file as load_torch

    config = json.loads((MODEL / "config.json").read_text())
    heads, kv_heads, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(dim)
    out.add_value_length(dim)
    out.add_rope_dimension_count(dim)
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for file in MODEL.glob("*.safetensors"):
        for name, tensor in load_torch(file).items():
            x = tensor.to(torch.float32).numpy()
            for part, n in (("q_proj.weight", heads), ("k_proj.weight", kv_heads)):
                if name.endswith(part):
                    x = x.reshape(n, 2, dim // 2, -1).swapaxes(1, 2).reshape(x.shape)
            kind = np.float32 if x.ndim == 1 else np.float16
            out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), x.astype(kind))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class Llama:
    """A llama.cpp context over a GGUF file, one sequence."""

    def __init__(self, path: Path, tokens: int, flash: bool) -> None:
        import llama_cpp

        self.c = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_threads, options.n_threads_batch = tokens, 512, 1, 1
        options.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(self.model, options)

    def read(self, ids: list[int], place: int) -> int:
        """The likeliest token after `ids`, which begin at position `place`."""
        c = self.c
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            batch = c.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place + start + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i == len(part) - 1
            assert c.llama_decode(self.context, batch) == 0
            c.llama_batch_free(batch)
        size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(self.context, -1), (size,)).argmax())

    def answer(self, last: int, place: int, count: int) -> list[int]:
        ids = [last]
        for i in range(count):
            ids.append(self.read(ids[-1:], place + i))
        return ids[1:]

    def save(self, path: Path, ids: list[int]) -> None:
        array: Any = (self.c.llama_token * len(ids))(*ids)
        assert self.c.llama_state_seq_save_file(self.context, str(path).encode(), 0, array, len(ids))

    def restore(self, path: Path, ids: list[int]) -> None:
        got, count = (self.c.llama_token * len(ids))(), ctypes.c_size_t(0)
        arguments = (self.context, str(path).encode(), 0, got, len(ids), ctypes.byref(count))
        assert self.c.llama_state_seq_load_file(*arguments)
        assert list(got[: count.value]) == ids


@pytest.mark.parametrize("flash", [True, False])
def test_llama_cpp_continues_what_was_folded(flash: bool, tmp_path: Path) -> None:
    """A slot file of 3,000 tokens: under a 3.5th of its size, restored by a fresh context, and answered alike."""
    pytest.importorskip("llama_cpp")
    from transformers import AutoTokenizer

    from kvfold.evaluation.text import haystack, stream

    ids = stream(haystack(), AutoTokenizer.from_pretrained(MODEL))[:3000]
    write_gguf(tmp_path / "m.gguf")
    first = Llama(tmp_path / "m.gguf", 3200, flash)
    first.read(ids[:-1], 0)
    first.save(tmp_path / "slot", ids[:-1])
    answer = first.answer(ids[-1], len(ids) - 1, 16)
    for profile, times in (("lossless", 1), ("balanced", 3.5)):
        folding.fold(
            (tmp_path / "slot").read_bytes(), [folding.Heads(2, 128)] * 6, profiles.load(profile).spec, tmp_path / "x"
        )
        assert (tmp_path / "x").stat().st_size * times <= (tmp_path / "slot").stat().st_size
        (tmp_path / "back").write_bytes(folding.unfold(tmp_path / "x"))
        second = Llama(tmp_path / "m.gguf", 3200, flash)
        second.restore(tmp_path / "back", ids[:-1])
        assert second.answer(ids[-1], len(ids) - 1, 16) == answer
