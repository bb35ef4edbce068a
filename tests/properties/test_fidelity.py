"""Folded against exact attention, measured on the way: the figures are those of a computation by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfold.cache.fidelity import QUERIES
from kvfold.cache.layer import FoldedAttention
from kvfold.config import CacheSpec, SideSpec
from kvfold.engine.select import make_engine
from kvfold.errors import NoImplementation

HEADS, GROUPS, DIM, SCALE = 2, 3, 64, 0.125
RAW = SideSpec("raw", 16)


def layer_of(spec: CacheSpec, backend: str = "torch") -> FoldedAttention:
    return FoldedAttention(spec, 0, lambda *how: make_engine(backend, *how))


def call(length: int, seed: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, HEADS * GROUPS, length, DIM, generator=g)
    k, v = (torch.randn(rows, HEADS, length, DIM, generator=g) for _ in range(2))
    return q, k + 1, v


def watched(spec: CacheSpec, backend: str, lengths: list[int], every: int = 1) -> tuple[FoldedAttention, list[Tensor]]:
    layer = layer_of(spec, backend)
    from kvfold.cache.fidelity import Fidelity

    layer.fidelity = Fidelity(every)
    out = [layer.attend(*call(n, i), [0], SCALE) for i, n in enumerate(lengths)]
    return layer, out


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spec", [CacheSpec(), CacheSpec(window=0, sinks=0, centre=False)])
def test_the_figures_are_those_of_a_computation_by_hand(backend: str, spec: CacheSpec) -> None:
    lengths = [300, 1, 130, 1, 1, 200]
    try:
        layer, _ = watched(spec, backend, lengths)
    except NoImplementation as error:
        pytest.skip(str(error))
    plain = layer_of(spec, backend)
    squares, outputs, masses = [], [], []
    all_k, all_v = torch.empty(1, HEADS, 0, DIM), torch.empty(1, HEADS, 0, DIM)
    for i, n in enumerate(lengths):
        q, k, v = call(n, i)
        before = plain.sequences[0].folded if plain.sequences else 0
        if before:
            view = plain.sequences[0].view(0)
            fk, _ = plain.engine.unfold(torch.cat(view.runs), plain.sequences[0].state)  # type: ignore[union-attr]
        all_k, all_v = torch.cat([all_k, k], 2), torch.cat([all_v, v], 2)
        length = all_k.shape[2]
        plain.attend(q, k, v, [0], SCALE)
        s = plain.sequences[0]
        if s.folded == before:
            continue
        page = slice(s.folded - 128, s.folded)
        back = plain.engine.unfold(s.pool.row(s.pages[-1])[None], s.state)  # type: ignore[union-attr]
        rows = q[0, :, -QUERIES:].unflatten(0, (HEADS, GROUPS)).flatten(1, 2) * SCALE
        exact, folded = rows @ all_k[0, :, page].mT, rows @ back[0].mT
        squares.append((exact - folded).square().mean())
        o, f = exact.softmax(-1) @ all_v[0, :, page], folded.softmax(-1) @ back[1]
        outputs.append((o - f).square().sum() / o.square().sum())
        if before:
            keys = all_k[0, :, : length - n + 1].clone()
            keys[:, spec.sinks : before] = fk[:, spec.sinks : before]
            first = q[0, :, :1].unflatten(0, (HEADS, GROUPS)).flatten(1, 2) * SCALE
            masses.append((first @ keys.mT).softmax(-1)[..., spec.sinks : before].sum(-1).mean())
    told = layer.report()["fidelity"]
    assert told["samples"] == len(squares) >= 3
    assert told["score_error"] == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-3)
    assert told["output_error"] == pytest.approx(float(torch.stack(outputs).mean().sqrt()), rel=1e-3)
    assert told["folded_mass"] == pytest.approx(float(torch.stack(masses).mean()), abs=2e-3)
    assert 0.01 < told["score_error"] < 0.5


def test_exact_pages_have_no_error() -> None:
    layer, _ = watched(CacheSpec(RAW, RAW, centre=False), "torch", [300, 200])
    told = layer.report()["fidelity"]
    assert (told["samples"], told["score_error"], told["output_error"]) == (2, 0, 0)
    assert 0 < told["folded_mass"] < 1


def test_coarser_codes_have_larger_errors() -> None:
    errors = [
        watched(CacheSpec(SideSpec("mse", b), SideSpec("mse", b)), "torch", [300])[0].report()["fidelity"]
        for b in (2, 4)
    ]
    for name in ("score_error", "output_error"):
        assert errors[0][name] > 2 * errors[1][name]


@pytest.mark.parametrize(("every", "samples"), [(1, 5), (2, 4), (4, 2), (100, 1)])
def test_one_page_in_so_many_is_a_sample(every: int, samples: int) -> None:
    layer, _ = watched(CacheSpec(window=0), "torch", [300, 84, 128, 256, 128], every)  # folds 2, 1, 1, 2, 1 pages
    assert layer.report()["fidelity"]["samples"] == samples


def test_watching_changes_no_bit_and_nobody_pays_who_does_not() -> None:
    lengths = [300, 1, 130, 1]
    spec = CacheSpec()
    layer, seen = watched(spec, "torch", lengths)
    plain = layer_of(spec)
    plain.prepare(*call(1, 0)[1:])
    asked: list[str] = []
    real = plain.engine.unfold  # type: ignore[union-attr]
    plain.engine.unfold = lambda *a: asked.append("unfold") or real(*a)  # type: ignore[union-attr, method-assign]
    out = [plain.attend(*call(n, i), [0], SCALE) for i, n in enumerate(lengths)]
    assert all(torch.equal(a, b) for a, b in zip(out, seen, strict=True))
    assert asked == []
    assert "fidelity" not in plain.report()
    assert layer.fork().fidelity is layer.fidelity


def test_pages_filled_up_after_a_trim_are_not_compared() -> None:
    layer, _ = watched(CacheSpec(), "torch", [700])
    assert layer.report()["fidelity"]["samples"] == 1
    layer.trim([400])
    layer.attend(*call(200, 5), [0], SCALE)
    assert layer.sequences[0].folded == 384
    assert layer.report()["fidelity"]["samples"] == 1


def test_batches_and_pads_are_watched_too() -> None:
    from kvfold.cache.fidelity import Fidelity

    layer = layer_of(CacheSpec())
    layer.fidelity = Fidelity(1)
    layer.attend(*call(400, 0, rows=3), [0, 7, 390], SCALE)
    layer.attend(*call(300, 1, rows=3), [0, 5, 299], SCALE)
    told = layer.report()["fidelity"]
    assert told["samples"] == 4
    assert 0 < told["folded_mass"] < 1
