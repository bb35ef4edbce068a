"""transformers: sliding and chunked layers that take less folded than exact: equal to stock in lossless pages, and as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import LENGTH, ROUNDING, STEPS, config, logits_of, make, padded, prompt
from torch import Tensor
from transformers import DynamicCache

import kvfold
from kvfold.adapters import hf_transformers
from kvfold.adapters.hf_layers import FoldedWindowLayer
from kvfold.diagnosis import layers_of
from kvfold.errors import CannotTrim, Unsupported
from kvfold.loading import complete
from kvfold.planner.architecture import read
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.session import Session

FAMILIES = ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "mistral", "modernbert-decoder", "olmo3")
WIDE = 700  # a window that takes less folded, at head_dim 64


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows fold even where that takes more, as it does for the model's own numbers."""
    monkeypatch.setattr(hf_transformers, "folds_smaller", lambda *_: True)


def windows(cache: Any) -> list[FoldedWindowLayer]:
    return [x for x in cache.layers if isinstance(x, FoldedWindowLayer)]


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max()) < ROUNDING * float(want.std())


def wide(family: str, **changes: Any) -> Any:
    """A model of two layers with heads that native kernels have, and a window wide enough to fold."""
    small = {"num_hidden_layers": 2, "head_dim": 64, "sliding_window": WIDE, "attention_chunk_size": WIDE}
    known = config(family).to_dict()
    small |= {"layer_types": known["layer_types"][:2]} if known.get("layer_types") else {}
    own = {**known, **{k: v for k, v in small.items() if k in known}, **changes}
    torch.manual_seed(0)
    return type(make(family))(type(config(family))(**own)).eval()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_is_stock(family: str) -> None:
    model = make(family)
    kvfold.detach(model)
    want = logits_of(model, DynamicCache(config=model.config))
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, "lossless")
        assert close(logits_of(model, cache), want)
    held = windows(cache)
    assert held
    assert all(s.folded for x in held for s in x.folded.sequences)


@torch.no_grad()
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", FAMILIES)
def test_long_past_the_window(family: str) -> None:
    """Calls longer and shorter than the window, two rows of which one begins with padding."""
    model = make(family)
    ids, mask = prompt(2, 900), torch.ones(2, 900, dtype=torch.long)
    ids[1, :150], mask[1, :150] = 0, 0

    def logits(cache: Any) -> Tensor:
        parts, start = [], 0
        for stop in (400, 401, 700, 710, *range(711, 720), 900):
            call = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            parts.append(model(ids[:, start:stop], **call).logits)
            start = stop
        return torch.cat(parts, 1)[mask.bool()]

    kvfold.detach(model)
    want = logits(DynamicCache(config=model.config))
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, "lossless")
        assert close(logits(cache), want)
    assert all(s.given_up for x in windows(cache) for s in x.folded.sequences)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text", "mistral"])
def test_ids_are_those_of_the_stock_cache(family: str, options: dict[str, Any]) -> None:
    model = make(family)
    ids, mask = padded()
    if "num_beams" not in options:
        ids, mask = torch.cat([ids[:1, :20]] * 12, 1), mask[:1]
    own = {"attention_mask": mask[:, : ids.shape[1]], "max_new_tokens": 12, "do_sample": False, **options}
    own["attention_mask"] = torch.ones_like(ids) if len(ids) == 1 else own["attention_mask"]
    kvfold.detach(model)
    want = model.generate(ids, past_key_values=DynamicCache(config=model.config), **own)
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, "lossless")
        assert torch.equal(model.generate(ids, past_key_values=cache, **own), want)
    assert windows(cache)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text", "mistral"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_wide_windows_fold_by_themselves(family: str, backend: str) -> None:
    """Whatever the cuts: close to stock at four bits and more, the same in the kernels and in torch, bytes as planned."""
    model = wide(family)
    spec = load("balanced").spec.with_overrides(key_codec="mse", key_bits=8, value_codec="mse", value_bits=8)
    if backend == "auto":
        spec = spec.with_overrides(key_bits=4, value_bits=4)
    ids = prompt(1, 3 * WIDE)
    want = model(ids).logits[:, -70:]
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, spec=spec, backend=backend)
        start = 0
        for stop in (10, 1500, 1501, 1800, *range(2 * WIDE + 630, 3 * WIDE + 1)):
            out = model(ids[:, start:stop], past_key_values=cache).logits
            start = stop
            result = plan(read(complete(model.config)), Setting(spec, stop, dtype_bytes=4, backend=backend))
            assert result["folded_bytes"] == cache.nbytes
    assert {x.folded.engine.name for x in windows(cache)} == {"cpu" if backend == "auto" else "torch"}
    error = float((out - want[:, -1:]).norm() / want[:, -1:].norm())
    assert error < (0.2 if backend == "auto" else 0.02)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text"])
def test_kernels_read_what_torch_reads(family: str) -> None:
    model = wide(family)
    ids = prompt(2, 2000)
    outs = []
    with kvfold.attach(model):
        for backend in ("cpu", "torch"):
            cache = kvfold.FoldedCache(model.config, "balanced", backend=backend)
            for part in ids[:, :-9].split(400, 1):
                model(part, past_key_values=cache)
            outs.append(torch.cat([model(x, past_key_values=cache).logits for x in ids[:, -9:].split(1, 1)], 1))
    assert float((outs[0] - outs[1]).abs().max()) < 0.02 * float(outs[1].std())


@torch.no_grad()
def test_padding_between_tokens_of_a_window_is_refused() -> None:
    model = wide("mistral")
    mask = torch.ones(1, 1200, dtype=torch.long)
    mask[:, 1000:1010] = 0
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config)
        model(prompt(1, 1000), attention_mask=mask[:, :1000], past_key_values=cache)
        with pytest.raises(Unsupported, match="between the tokens of a sliding window"):
            model(prompt(1, 200), attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_trims_inside_the_exact_part_and_no_further() -> None:
    model = wide("gemma3_text")
    ids = prompt(1, 2000)
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config)
        for part in ids.split(500, 1):
            model(part, past_key_values=cache)
        other = cache.fork()
        want = model(ids[:, :1], past_key_values=cache).logits
        model(ids[:, 7:90], past_key_values=other)
        other.crop(-83)
        assert torch.equal(model(ids[:, :1], past_key_values=other).logits, want)
        before = [x.get_seq_length() for x in other.paged_layers]
        with pytest.raises(CannotTrim, match="does not keep"):
            other.crop(-900)
        assert [x.get_seq_length() for x in other.paged_layers] == before


@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text", "mistral"])
def test_sessions(family: str, tmp_path: Path) -> None:
    """Saved and loaded, gone back to a checkpoint, decoded in one call with a fork: the same bits as never interrupted."""
    model = wide(family)
    session = Session.new(model)
    session.runner.ways_back = 4
    tokens = prompt(1, 1600)[0].tolist()
    session.extend(tokens)
    assert windows(session.cache)
    fork = session.fork()
    want = session.extend([5, 6, 7])
    session.trim(3)
    session.save(tmp_path / "kept")
    again = Session.load(tmp_path / "kept", model)
    for s in (again, session, fork):
        assert torch.equal(s.extend([5, 6, 7]), want)
    session.trim(1000)
    assert session.tokens == tokens[:603]
    with SessionBatch([session, fork]) as together:
        together.step([8, 8])
    assert [len(s.tokens) for s in (session, fork)] == [604, 1604]
    kvfold.detach(model)


def test_doctor_and_plan_say_which_windows_fold() -> None:
    wide_window, narrow = wide("gemma3_text").config, config("gemma3_text")
    assert [r["folds"] for r in layers_of(wide_window, device="cpu")] == [True, True]
    assert [r["engine"] for r in layers_of(wide_window, device="cpu")] == ["cpu", "cpu"]
    assert [r["why_not"][:30] for r in layers_of(narrow, device="cpu")][::2] == ["it keeps the newest 24 tokens "] * 2


@torch.no_grad()
def test_calls_of_any_length_leave_the_same_bytes() -> None:
    model = wide("mistral")
    ids, sizes = prompt(1, 2400 + STEPS), set()
    with kvfold.attach(model):
        for cut in (LENGTH, 900, 2400):
            cache = kvfold.FoldedCache(model.config)
            for part in ids.split(cut, 1):
                model(part, past_key_values=cache)
            sizes.add(cache.nbytes)
    assert len(sizes) == 1
