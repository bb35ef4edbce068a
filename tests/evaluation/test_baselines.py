"""Caches of others beside ours: their codecs keep their step size, their bits are counted whole, their errors rank as known."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters import tiny
from transformers import AutoModelForCausalLM

from kvfold import profiles
from kvfold.cli.main import main
from kvfold.codec.peers import Coded, Kivi, RotatedQ4, affine, affine_decode, q4_0, q4_0_decode
from kvfold.config import CacheSpec
from kvfold.errors import InvalidConfig, MissingExtra, ShapeMismatch, UnsupportedHeadDim
from kvfold.evaluation.contenders import BASELINES, RESIDUAL, Folded, baseline
from kvfold.evaluation.divergence import figures, score
from kvfold.evaluation.simulated import SimulatedLayer
from kvfold.evaluation.text import haystack, windows
from kvfold.loading import Options, load

HALF = 2.0**-11  # relative error of a float16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo():
    return load("demo", Options(dtype="float32"))


groups = st.builds(
    lambda seed, shift, size: shift + size * torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(seed)),
    st.integers(0, 2**31),
    st.floats(-50, 50),
    st.floats(1e-2, 20),
)


@given(groups, st.sampled_from([2, 3, 4]))
def test_affine_groups_come_back_within_half_a_step(x, bits):
    coded = affine(x, bits)
    scale, zero = (m.float() for m in coded.meta)
    assert int(coded.codes.max()) == (1 << bits) - 1
    assert int(coded.codes.min()) == 0
    spread = scale * ((1 << bits) - 1)
    slack = HALF * (spread + zero.abs()) * 1.01 + 1e-6 * x.abs().max()
    assert bool(((affine_decode(coded) - x).abs() <= scale / 2 + slack).all())
    assert coded.size == x.numel() * bits + 2 * 16 * 30


@given(groups)
def test_q4_0_blocks_come_back_within_half_a_step(x):
    coded = q4_0(x)
    d = coded.meta[0].float().abs()
    back = q4_0_decode(coded)
    slack = 8 * d * HALF * 1.01 + 1e-6 * x.abs().max()
    # The largest value is exact, and its opposite is the one number 4 bits lack: 7 d instead of 8 d.
    top = x.abs().amax(-1, keepdim=True)
    inside = (x.abs() < top * 7.5 / 8) | (x.abs() == top)
    assert bool(((back - x).abs() <= torch.where(inside, d / 2, d) + slack).all())
    assert coded.size == 4.5 * x.numel()


def test_a_constant_group_is_kept():
    x = torch.zeros(2, 32)
    assert torch.equal(affine_decode(affine(x, 2)), x)
    assert torch.equal(q4_0_decode(q4_0(x)), x)
    assert torch.equal(affine_decode(affine(x + 1.5, 2)), x + 1.5)


def test_kivi_groups_keys_by_channel_and_values_by_token():
    """A channel that is large everywhere costs keys nothing, a token that is large everywhere costs values nothing."""
    x = torch.randn(2, 128, 64)
    kivi = Kivi(2, 64)
    plain = [float(((kivi.fold(x, s)[0] - x) ** 2).mean()) for s in (0, 1)]
    for side, where in ((0, (slice(None), slice(None), 5)), (1, (slice(None), 5))):
        y = x.clone()
        y[where] *= 1000
        for s in (0, 1):
            error = (kivi.fold(y, s)[0] - y) ** 2
            error[where] = 0
            worse = float(error.mean()) > 2 * plain[s]
            assert worse == (s != side)
    assert kivi.fold(x, 0)[1] == kivi.fold(x, 1)[1] == 3 * x.numel()


def test_rotated_q4_depends_on_layer_and_seed_and_spreads_outliers():
    x = torch.randn(2, 128, 128)
    x[..., 3] *= 50
    folds = [RotatedQ4(128, 2, layer, seed, CPU).fold(x, 0) for layer, seed in ((0, 1), (1, 1), (0, 2), (0, 1))]
    assert torch.equal(folds[0][0], folds[3][0])
    assert not torch.equal(folds[0][0], folds[1][0])
    assert not torch.equal(folds[0][0], folds[2][0])
    assert folds[0][1] == 4.5 * x.numel()
    error = float(((folds[0][0] - x) ** 2).sum() / (x**2).sum())
    assert error < 0.01


@pytest.mark.parametrize("make", [partial(Kivi, 2), partial(RotatedQ4, heads=1, layer=0, seed=1, device=CPU)])
def test_a_head_dim_that_no_group_divides_is_refused(make):
    with pytest.raises(UnsupportedHeadDim, match="80"):
        make(dim=80)


class Nothing:
    """A codec that loses everything, to see what went through it."""

    def fold(self, x, side):
        return torch.zeros_like(x), x.numel()


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.integers(0, 130), st.integers(0, 8))
def test_simulated_pages_are_those_of_a_folded_cache(cuts, window, sinks):
    layer = SimulatedLayer(lambda *_: Nothing(), window, sinks)
    total = sum(cuts)
    keys, values = 1 + torch.rand(1, 2, total, 4), 1 + torch.rand(1, 2, total, 4)
    spec, at = CacheSpec(window=window, sinks=sinks), 0
    for n in cuts:
        folded = spec.folded_tokens(at)
        k, v = layer.update(keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
        for got, all_ in ((k, keys), (v, values)):
            expected = all_[:, :, :at].clone()
            expected[:, :, sinks:folded] = 0
            assert torch.equal(got, expected)
        folded = spec.folded_tokens(at)
        assert layer.exact_tokens == at - folded + min(sinks, folded)
        assert layer.folded_bits == layer.folded_values == folded * 2 * 8
    with pytest.raises(ShapeMismatch, match="2 sequences"):
        layer.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))


def test_errors_rank_as_known(demo):
    """One window is enough for what differs several times over; exact tokens are those of our own cache."""
    names = ["kivi-2", "rotated-q4", "turboquant-3", "hf-hqq-4"]
    contenders = [baseline(n, demo.model.config) for n in names]
    folded = Folded("folded", demo.model.config, CacheSpec())
    parts = windows(haystack(), demo.tokenizer, 1, 512, 0)
    ours, *theirs = (figures(s) for s in score(demo.model, parts, [folded, *contenders]))
    r = dict(zip(names, theirs, strict=True))
    assert r["rotated-q4"]["kld_mean"] < r["turboquant-3"]["kld_mean"] < r["kivi-2"]["kld_mean"] < 0.05
    assert ours["kld_mean"] < r["turboquant-3"]["kld_mean"]
    assert [r[n]["bits_per_value"] for n in names] == [3.0, 4.5, 3.125, 4.5]
    for n in ("kivi-2", "rotated-q4", "turboquant-3"):
        assert r[n]["exact_tokens_mean"] == ours["exact_tokens_mean"]
        assert r[n]["reference_bytes"] == ours["reference_bytes"]
    assert r["hf-hqq-4"]["exact_tokens_max"] == RESIDUAL
    assert {r[n]["perplexity_reference"] for n in names} == {ours["perplexity_reference"]}
    # 320 exact tokens at 4 bytes (of which 4 are sinks), 256 folded ones at 3 bits: 1024 numbers a token in 6 layers.
    values = ours["reference_bytes"] // 2 // 512
    assert r["kivi-2"]["cache_bytes"] == values * (4 * (128 + 4) + 384 * 3 / 8)


@pytest.mark.parametrize("name", ["kivi-2", "hf-hqq-4"])
def test_running_states_of_hybrid_models_stay_as_they_are(name):
    config = copy.deepcopy(tiny.make("qwen3_next").config)
    config.head_dim = 32
    model = AutoModelForCausalLM.from_config(config).eval()
    [got] = score(model, [torch.randint(5, tiny.VOCAB, (300,)).tolist()], [baseline(name, config)])
    assert 0 < float(got.kl.mean()) < 0.1
    assert got.sizes["reference_bytes"] == 2 * 300 * 2 * 2 * 2 * 32


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("hf-quanto-4", 4.5), ("hf-quanto-2", 2.5)])
def test_optimum_quanto_as_it_is(demo, name, bits):
    """Slow: its first use compiles an extension."""
    parts = windows(haystack(), demo.tokenizer, 1, 512, 0)
    [got] = score(demo.model, parts, [baseline(name, demo.model.config)])
    assert got.sizes["bits_per_value"] == bits
    assert 0 < float(got.kl.mean()) < 0.2


def test_eval_tells_of_baselines(capsys):
    arguments = ["eval", "demo", "--windows", "1", "--window-tokens", "256", "--baseline", "rotated-q4", "--json"]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert not left.value.code
    result = json.loads(capsys.readouterr().out)
    [row] = result["baselines"]
    assert row["baseline"] == "rotated-q4"
    assert set(row) == set(result) - {"baselines"} | {"baseline"}


def test_a_profile_is_a_contender_with_the_seed_of_the_run(demo):
    contender = baseline("turbo-3", demo.model.config, seed=7)
    assert contender == Folded("turbo-3", demo.model.config, replace(profiles.load("turbo-3").spec, seed=7))


def test_a_wrong_name_and_a_missing_package_are_told(demo, monkeypatch):
    with pytest.raises(InvalidConfig, match="kivi-2, rotated-q4"):
        baseline("kivi-3", demo.model.config)
    for package in ("hqq", "optimum.quanto"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in BASELINES[:3]:
        with pytest.raises(MissingExtra, match=r"kvfold\[peers\]"):
            baseline(name, demo.model.config)


def test_coded_counts_every_number():
    assert Coded(torch.zeros(3, 32, dtype=torch.uint8), 2, (torch.zeros(3, 1).half(),)).size == 192 + 48
