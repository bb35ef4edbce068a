"""Bad input: every mistake is a named error with its cure, and leaves the cache as it was."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

import kvfold
from kvfold import errors
from kvfold.cache.layer import FoldedAttention
from kvfold.config import CODEC_BITS, CacheSpec, SideSpec
from kvfold.engine.select import make_engine
from kvfold.errors import (
    DeviceMismatch,
    DtypeMismatch,
    InvalidConfig,
    KvfoldError,
    NoImplementation,
    ShapeMismatch,
    UnknownCodec,
    UnknownProfile,
    UnsupportedHeadDim,
)

DIM = 32


def layer_of(spec: CacheSpec | None = None) -> FoldedAttention:
    return FoldedAttention(spec or CacheSpec(), 5, lambda *request: make_engine("torch", *request))


def ones(batch: int = 2, heads: int = 2, tokens: int = 3, dim: int = DIM, **options: Any) -> torch.Tensor:
    return torch.ones(batch, heads, tokens, dim, **options)


def filled() -> FoldedAttention:
    layer = layer_of()
    layer.append(torch.randn(2, 2, 300, DIM), torch.randn(2, 2, 300, DIM), [0, 0])
    return layer


@pytest.mark.parametrize(
    ("k", "v", "kind", "named"),
    [
        (ones(dim=DIM)[0], ones(), ShapeMismatch, r"\[batch, heads, tokens, head_dim\]"),
        (ones(), ones(dim=16), ShapeMismatch, f"head_dim {DIM} and {DIM}"),
        (ones(tokens=2), ones(tokens=3), ShapeMismatch, "one shape"),
        (ones(batch=3), ones(batch=3), ShapeMismatch, "2 sequences"),
        (ones(heads=4), ones(heads=4), ShapeMismatch, "2 heads"),
        (ones(dim=64), ones(dim=64), ShapeMismatch, f"head_dim {DIM}"),
        (ones(dtype=torch.float64), ones(dtype=torch.float64), DtypeMismatch, "float32, bfloat16 or float16"),
        (ones(dtype=torch.int32), ones(dtype=torch.int32), DtypeMismatch, "float32, bfloat16 or float16"),
        (ones(), ones(dtype=torch.bfloat16), DtypeMismatch, "float32, bfloat16 or float16"),
        (ones(dtype=torch.bfloat16), ones(dtype=torch.bfloat16), DtypeMismatch, "one dtype per cache"),
        (ones(), ones(device="meta"), DeviceMismatch, "one device"),
        (ones(device="meta"), ones(device="meta"), DeviceMismatch, "one device per layer"),
    ],
)
def test_keys_and_values_that_do_not_fit(k: torch.Tensor, v: torch.Tensor, kind: type[KvfoldError], named: str) -> None:
    layer = filled()
    before = layer.nbytes
    for use in (lambda: layer.append(k, v, [0, 0]), lambda: layer.attend(k, k, v, [0, 0], 1.0)):
        with pytest.raises(kind, match=named) as caught:
            use()
        assert "layer 5" in caught.value.message
        assert caught.value.cure
    assert [s.length for s in layer.sequences] == [300, 300]
    assert layer.nbytes == before


@pytest.mark.parametrize(
    ("q", "kind"),
    [
        (ones(tokens=2), ShapeMismatch),
        (ones(heads=3), ShapeMismatch),
        (ones(batch=1), ShapeMismatch),
        (ones(dim=16), ShapeMismatch),
        (ones()[0], ShapeMismatch),
        (ones(dtype=torch.bfloat16), DtypeMismatch),
        (ones(device="meta"), DeviceMismatch),
    ],
)
def test_queries_that_do_not_fit(q: torch.Tensor, kind: type[KvfoldError]) -> None:
    layer = filled()
    with pytest.raises(kind, match="queries"):
        layer.attend(q, ones(), ones(), [0, 0], 1.0)
    assert [s.length for s in layer.sequences] == [300, 300]


def test_a_first_call_may_be_repeated_with_another_shape() -> None:
    """Nothing was stored, so nothing is fixed."""
    layer = layer_of()
    k = ones()
    k[0, 0, 0, 0] = float("inf")
    with pytest.raises(errors.NonFiniteInput):
        layer.append(k, ones(), [0, 0])
    layer.append(ones(3, 1, 9, 64), ones(3, 1, 9, 64), [0, 0, 0])
    layer.clear()
    layer.append(ones(dtype=torch.bfloat16), ones(dtype=torch.bfloat16), [0, 0])


def test_zero_vectors_fold_to_zero() -> None:
    for codec in ("mse", "uniform", "prod", "qjl", "polar", "split"):
        bits = min(CODEC_BITS[codec])
        side = SideSpec(codec, bits, rotation="dense" if codec == "split" else "hadamard")
        layer = layer_of(CacheSpec(side, side, 0, 0, centre=codec not in ("split", "qjl")))
        zero = torch.zeros(1, 2, 256, DIM)
        layer.append(zero, zero, [0])
        out = layer.attend(torch.randn(1, 4, 1, DIM), zero[:, :, :1], zero[:, :, :1], [0], 1.0)
        assert torch.equal(out, torch.zeros(1, 4, 1, DIM)), codec


@pytest.mark.parametrize("dim", [4, 7])
def test_head_dims_without_a_form(dim: int) -> None:
    with pytest.raises(UnsupportedHeadDim) as caught:
        layer_of().append(ones(dim=dim), ones(dim=dim), [0, 0])
    assert str(dim) in caught.value.message
    assert caught.value.cure


@pytest.mark.parametrize(
    ("make", "kind", "named"),
    [
        (lambda: SideSpec("vq"), UnknownCodec, "mse"),
        (lambda: SideSpec("mse", 9), InvalidConfig, "1, 2, 3, 4, 5, 6, 7, 8"),
        (lambda: SideSpec("mse", 2.5), InvalidConfig, "Its widths are"),
        (lambda: SideSpec("split", 3), InvalidConfig, "2.5, 3.5"),
        (lambda: SideSpec(scale="max"), InvalidConfig, "unbiased"),
        (lambda: SideSpec(rotation="fourier"), InvalidConfig, "hadamard"),
        (lambda: SideSpec(sketch="sparse"), InvalidConfig, "orthogonal"),
        (lambda: CacheSpec(window=-1), InvalidConfig, "0 or more"),
        (lambda: CacheSpec(sinks=128), InvalidConfig, "127"),
        (lambda: CacheSpec(seed=-1), InvalidConfig, "63-bit"),
        (lambda: CacheSpec(key=SideSpec("raw", 16)), InvalidConfig, "centre"),
    ],
)
def test_specs_that_cannot_exist(make: Any, kind: type[KvfoldError], named: str) -> None:
    with pytest.raises(kind, match=named) as caught:
        make()
    assert caught.value.cure


def test_an_unknown_profile_lists_the_names_there_are() -> None:
    config = tiny.CONFIGS["llama"]()
    with pytest.raises(UnknownProfile, match="lossless") as caught:
        kvfold.FoldedCache(config, "blanced")
    assert "balanced" in caught.value.cure


def test_backends_by_name() -> None:
    config = tiny.CONFIGS["llama"]()
    model = tiny.make("llama")
    kvfold.attach(model)
    with pytest.raises(InvalidConfig, match="torch"):
        kvfold.FoldedCache(config, backend="cudnn")
    for backend, kind, named in (
        ("cuda", NoImplementation, "cuda"),
        ("cpu", NoImplementation, "head_dim 16"),
    ):
        cache = kvfold.FoldedCache(config, backend=backend)
        with torch.no_grad(), pytest.raises(kind, match=named) as caught:
            model(tiny.prompt(1, 8), past_key_values=cache)
        assert caught.value.cure
        assert cache.get_seq_length() == 0


def every_error(kind: type[KvfoldError] = KvfoldError) -> Iterator[type[KvfoldError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from every_error(child)


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda k: k.__name__)
def test_errors_travel_and_speak_json(kind: type[KvfoldError]) -> None:
    error = kind("something is wrong", "Do this instead")
    assert str(error) == "something is wrong. Do this instead"
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), twin.message, twin.cure) == (kind, error.message, error.cure)
    assert json.loads(json.dumps(error.as_json()))["error"]["kind"] == kind.__name__
    # The drawn tree names every error there is.
    assert kind.__module__ != errors.__name__ or kind.__name__ in str(errors.__doc__)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Block())
import kvfold
from kvfold.errors import MissingExtra
try:
    {use}
except MissingExtra as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "use", "extra"),
    [
        ("torch", "kvfold.FoldedCache", "kvfold[transformers]"),
        ("transformers", "kvfold.attach", "kvfold[transformers]"),
        ("transformers", "from kvfold import loading; loading.load('demo')", "kvfold[transformers]"),
        ("matplotlib", "from kvfold.evaluation import plots; plots.heat_maps([], 'x.png')", "kvfold[plot]"),
    ],
)
def test_a_missing_extra_names_its_install_command(name: str, use: str, extra: str) -> None:
    code = BLOCKED.format(name=name, use=use)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Install it with: pip install '{extra}'" in done.stdout
    assert repr(name) in done.stdout
