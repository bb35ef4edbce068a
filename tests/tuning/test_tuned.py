"""The tuned form: bits per channel are read back as they were searched, cost what was predicted, and give way where they lose."""

from __future__ import annotations

import base64
import json
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold import FoldedCache, attach
from kvfold.cli.main import main
from kvfold.codebook.basis import Bases, content, remember
from kvfold.codebook.trellis import STATE_BITS, code
from kvfold.codec.torch_tuned import STARTS, Tuned, spread
from kvfold.config import PAGE_TOKENS, TUNED, CacheSpec, SideSpec
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import LayerShape
from kvfold.errors import InvalidConfig, Unsupported
from kvfold.evaluation.divergence import compare
from kvfold.evaluation.text import haystack, windows
from kvfold.loading import Loaded, Options
from kvfold.loading import load as load_model
from kvfold.planner.architecture import read
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load
from kvfold.tuning.allocation import ERROR, allocate, bases
from kvfold.tuning.choice import check, tuned
from kvfold.tuning.statistics import Moments, Watch, collect, watching

HEADS, DIM = 2, 64
CPU = torch.device("cpu")
EXTREME = load("extreme").spec


def spreads(seed: int, tilt: float) -> Tensor:
    """Positive matrices [H, D, D] whose eigenvalues fall by e^tilt."""
    random = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=random))[0]
    return (q * torch.linspace(0, -tilt, DIM, dtype=torch.float64).exp()) @ q.mT


def moments(tilt: float = 5.0) -> dict[tuple[int, str], Moments]:
    return {
        (0, side): Moments(spreads(i, tilt) * 1000, spreads(9 + i, 2.0) * (50 + 400 * i), 1000, 50)
        for i, side in enumerate(("key", "value"))
    }


def drawn(spread: Tensor, tokens: int, seed: int) -> Tensor:
    """float32 [H, tokens, D] with that spread."""
    random = torch.Generator().manual_seed(seed)
    white = torch.randn(HEADS, tokens, DIM, dtype=torch.float64, generator=random)
    return (white @ torch.linalg.cholesky(spread).mT).float()


def codec(made: Bases, side: str = "value", scale: str = "unbiased") -> Tuned:
    return Tuned(SideSpec(TUNED, 2, scale, basis="x"), DIM, [1, 2], made[0, side], side == "key", CPU)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bits", [0.4, 2, 3.5])
def test_strings_of_bits_are_read_as_a_register_reads_them(bits: float, plain: bool) -> None:
    one = codec(bases(moments(), bits, ("key", "value")))
    x = drawn(moments()[0, "value"].spread / 1000, PAGE_TOKENS, 3)
    state = torch.full((HEADS, 1), int(plain), dtype=torch.uint8)
    fields = one.encode(x[None], state)
    parts = {n: [v if v.dtype == torch.uint8 else v.contiguous().view(torch.uint8)] for n, v in fields.items()}
    z = one.decode(parts, state)[0]
    for token in (0, 77):
        string = "".join(f"{byte:08b}" for h in range(HEADS) for byte in fields["codes"][0, h, token].tolist())
        for h in range(HEADS):
            form = one.forms[h][int(plain)]
            own, string = string[: form.bits], string[form.bits :]
            header = int(fields["header"][0, h, token, 0])
            scale = float(fields["unit"][0, h, 0, 0]) * (header & 63)
            held, expected = f"{STARTS[header >> 6]:06b}", torch.zeros(DIM)
            for channel, width in zip(form.channels.tolist(), form.widths, strict=True):
                held, own = held + own[:width], own[width:]
                book = code(width)
                expected[channel] = book.by_window[0][int(held[-(STATE_BITS + width) :], 2)] * book.step * scale
            assert own == ""
            torch.testing.assert_close(z[h, token], expected, rtol=1e-5, atol=1e-6)
        assert set(string) <= {"0"}


def test_the_form_is_linear_in_queries_and_outputs() -> None:
    one = codec(bases(moments(), 2, ("key", "value")))
    q, z = torch.randn(HEADS, 3, DIM), torch.randn(HEADS, 5, DIM)
    for state in (None, torch.tensor([[1], [0]], dtype=torch.uint8)):
        scores = one.project(q, state) @ z.mT
        torch.testing.assert_close(scores, q @ one.lift(z, state).mT, rtol=1e-3, atol=1e-3)


def test_errors_cost_what_was_predicted_and_less_than_even_bits() -> None:
    """Vectors as the moments say: within a seventh (moments are shrunk) of what ERROR says of every channel."""
    own = moments()
    made = bases(own, 2, ("key", "value"))
    one = codec(made, scale="least-squares")
    x = drawn(own[0, "value"].spread / 1000, 16 * PAGE_TOKENS, 4)
    basis = made[0, "value"]
    predicted = (basis.weight**2 * torch.tensor(ERROR)[basis.widths.long()]).sum()
    lost = []
    for plain in (0, 1):
        total = 0.0
        for h in range(HEADS):
            form = one.forms[h][plain]
            errors = x[h] - one._read(form, *one._search(form, x[h])[:2]) @ form.inverse.mT
            total += float((errors @ basis.cost[h].mT).square().sum(-1).mean())
        lost.append(total)
    assert lost[0] == pytest.approx(float(predicted), rel=0.15)
    assert lost[0] < 0.6 * lost[1]


def test_a_head_that_loses_in_the_tuned_basis_stays_in_the_plain_one() -> None:
    own = moments()
    one = codec(bases(own, 2, ("key", "value")))
    known, other = own[0, "value"].spread / 1000, torch.linalg.inv(own[0, "value"].spread / 1000)
    mixed = torch.stack([known[0], other[1]])
    assert one.freeze(drawn(known, 400, 5)).tolist() == [[0], [0]]
    assert one.freeze(drawn(mixed, 400, 5)).tolist() == [[0], [1]]


def test_bits_go_where_they_save_most() -> None:
    energy = torch.tensor([[1.0, 0.2], [0.05, 1e-6]])
    assert allocate(energy, 1.5).tolist() == [[3, 2], [1, 0]]
    assert allocate(energy, 4).tolist() == [[4, 4], [4, 4]]
    assert allocate(energy, 0).sum() == 0
    assert spread(5, 8).tolist() == [0, 1, 0, 1, 1, 0, 1, 1]


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load_model("demo", Options(dtype="float32"))


class Shaken(Watch):
    """Noise where quantization errors would be, in one layer's keys or values."""

    def __init__(self, side: int, size: float, seed: int) -> None:
        super().__init__(CacheSpec())
        self.side, self.size, self.random, self.calls = side, size, torch.Generator().manual_seed(seed), 0

    def nudge(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls != 2 * 3 + self.side + 1:  # of layer 3
            return torch.zeros_like(x)
        return self.size * torch.randn(x.shape, generator=self.random)


@torch.no_grad()
def test_moments_predict_the_divergence_of_small_errors(demo: Loaded) -> None:
    part = windows(haystack(), demo.tokenizer, 1, 640, 0)
    found = collect(demo.model, part, CacheSpec(), draws=4)
    ids = torch.tensor(part)
    exact = demo.model(ids).logits[0].float()
    for i, (side, size) in enumerate((("key", 0.02), ("value", 0.005))):
        predicted = float(found[3, side].cost.diagonal(dim1=-2, dim2=-1).sum()) / 640 / 2 * size**2
        measured = []
        for seed in range(3):
            with watching(demo.model, Shaken(i, size, seed)):
                measured.append(float(compare(demo.model(ids).logits[0].float(), exact)[0].mean()))
        assert sum(measured) / 3 == pytest.approx(predicted, rel=0.35)
    assert demo.model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in demo.model.parameters())


@pytest.fixture(scope="module")
def own(demo: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile made by the command from little text."""
    path = tmp_path_factory.mktemp("own") / "own.toml"
    arguments = ["--windows", "1", "--window-tokens", "640", "--basis-windows", "2"]
    with pytest.raises(SystemExit) as left:
        main(["tune", "demo", "--tuned", "extreme", "--output", str(path), *arguments, "--json"])
    assert not left.value.code
    return path


@pytest.mark.slow
def test_the_command_writes_a_profile_that_loses_less_at_the_same_bits(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = load(str(own))
    assert (profile.base, profile.spec.key.codec, profile.spec.value.codec) == ("extreme", TUNED, TUNED)
    assert profile.spec.key.bits + profile.spec.value.bits == pytest.approx(4, abs=0.05)
    results = {}
    for name in ("extreme", str(own)):
        with pytest.raises(SystemExit):
            main(["eval", "demo", "--profile", name, "--windows", "1", "--window-tokens", "640", "--json"])
        results[name] = json.loads(capsys.readouterr().out)
    assert results[str(own)]["bits_per_value"] == pytest.approx(results["extreme"]["bits_per_value"], abs=0.02)
    assert results[str(own)]["kld_mean"] < 0.5 * results["extreme"]["kld_mean"]


def test_plans_say_what_a_tuned_cache_takes(own: Path, demo: Loaded) -> None:
    profile, model = load(str(own)), demo.model
    cache = FoldedCache(model.config, spec=profile.spec)
    with attach(model), torch.no_grad():
        model(torch.arange(500)[None] + 5, past_key_values=cache)
    planned = plan(read(model.config.to_dict()), Setting(profile.spec, 500, dtype_bytes=4))
    # One call holds what steps of one token would; its layers differ in size.
    assert planned["folded_bytes"] == cache.nbytes
    assert len({row["bytes"] for row in planned["layers"]}) > 1


def test_forks_and_refills_of_tuned_pages(own: Path) -> None:
    spec = load(str(own)).spec
    engine = TorchEngine(spec, LayerShape(0, 2, 128, 4), torch.float32, CPU)
    k, v = torch.randn(2, 2, PAGE_TOKENS, 128)[:, None].unbind(0)
    state = engine.freeze(k[0], v[0])
    row, again = (torch.zeros(engine.page_bytes, dtype=torch.uint8) for _ in range(2))
    engine.fold(k, v, False, [row], state)
    again.copy_(row)
    engine.refill(again, k[0, :, 40:], v[0, :, 40:], state)
    hats, same = engine.unfold(row[None], state), engine.unfold(again[None], state)
    for hat, other in zip(hats, same, strict=True):
        torch.testing.assert_close(hat[:, :40], other[:, :40])
        assert (hat - other).square().mean() < 0.05 * hat.square().mean()


def test_bases_that_are_not_there_or_not_bases_are_refused(own: Path, tmp_path: Path) -> None:
    spec = load(str(own)).spec
    with pytest.raises(InvalidConfig, match="2 heads and head_dim 128"):
        TorchEngine(spec, LayerShape(0, 3, 128, 4), torch.float32, CPU)
    with pytest.raises(InvalidConfig, match="no key basis for layer 6"):
        TorchEngine(spec, LayerShape(6, 2, 128, 4), torch.float32, CPU)
    missing = CacheSpec(SideSpec(TUNED, 2, basis="0" * 32))
    with pytest.raises(InvalidConfig, match="were not read"):
        TorchEngine(missing, LayerShape(0, 2, 128, 4), torch.float32, CPU)
    (tmp_path / "own.toml").write_text(own.read_text())
    with pytest.raises(InvalidConfig, match="cannot be read"):
        load(str(tmp_path / "own.toml"))
    (tmp_path / "own.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidConfig, match="not the bases"):
        load(str(tmp_path / "own.toml"))
    with pytest.raises(InvalidConfig, match="basis"):
        SideSpec(TUNED, 2)
    with pytest.raises(InvalidConfig, match="basis"):
        SideSpec("mse", 2, basis="0")
    with pytest.raises(InvalidConfig, match="no width 5"):
        SideSpec(TUNED, 5, basis="0")


def test_what_has_no_tuned_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unsupported, match="trellis"):
        check(load("turbo-3").spec)
    for wrong in (["--tuned", "extreme"], ["--tuned", "extreme", "--memory", "1GiB", "--output", "x.toml"]):
        with pytest.raises(SystemExit) as left:
            main(["tune", "demo", *wrong, "--json"])
        assert left.value.code == 1
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "InvalidConfig"


def test_a_tuned_spec_names_its_bases() -> None:
    made = bases(moments(), 2, ("value",))
    spec, data = tuned(EXTREME, made)
    assert spec.key == EXTREME.key
    assert spec.value == SideSpec(TUNED, 2.0, "unbiased", basis=remember(data))
    assert content(made) == data
    state: Any = Tuned(spec.value, DIM, [1, 2], made[0, "value"], False, CPU).fields
    assert 8 * state[0].count == 2 * DIM


PAGE = Path(__file__).parent / "page.json"


def committed() -> dict[str, str]:
    """A page of two heads of 16 numbers, the second in the plain basis, its bases and what they decode to, in base64."""
    random = torch.Generator().manual_seed(2)
    made: dict[tuple[int, str], Moments] = {}
    for side in ("key", "value"):
        a, b = (torch.randn(2, 16, 16, dtype=torch.float64, generator=random) for _ in range(2))
        made[0, side] = Moments(a @ a.mT, b @ b.mT, 1, 1)
    spec, data = tuned(CacheSpec(seed=3), bases(made, 2.25, ("key", "value")))
    engine = TorchEngine(spec, LayerShape(0, 2, 16, 4), torch.float32, CPU)
    state = torch.tensor([[0], [1]], dtype=torch.uint8)
    row = torch.zeros(engine.page_bytes, dtype=torch.uint8)
    k, v = torch.randn(2, 1, 2, PAGE_TOKENS, 16, generator=random)
    engine.fold(k, v, True, [row], (state, state))
    hats = torch.cat(engine.unfold(row[None], (state, state)))
    parts = {"bases": data, "page": row.numpy().tobytes(), "decoded": hats.numpy().tobytes()}
    return {
        "bits": repr((spec.key.bits, spec.value.bits)),
        **{n: base64.b64encode(x).decode() for n, x in parts.items()},
    }


def test_committed_pages_load_for_ever() -> None:
    held = json.loads(PAGE.read_text())
    digest = remember(base64.b64decode(held["bases"]))
    key, value = (SideSpec(TUNED, bits, "unbiased", basis=digest) for bits in literal_eval(held["bits"]))
    engine = TorchEngine(CacheSpec(key, value, seed=3), LayerShape(0, 2, 16, 4), torch.float32, CPU)
    state = torch.tensor([[0], [1]], dtype=torch.uint8)
    row = torch.frombuffer(bytearray(base64.b64decode(held["page"])), dtype=torch.uint8)
    expected = torch.frombuffer(bytearray(base64.b64decode(held["decoded"])), dtype=torch.float32)
    hats = torch.cat(engine.unfold(row[None], (state, state)))
    torch.testing.assert_close(hats.flatten(), expected, rtol=1e-5, atol=1e-6)
