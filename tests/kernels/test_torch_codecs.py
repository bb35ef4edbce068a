"""Codecs in torch against NumPy: exactly where the format is canonical, to float32's rounding elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvfold.codec import reference  # noqa: E402
from kvfold.codec.build import build  # noqa: E402
from kvfold.config import CacheSpec, SideSpec  # noqa: E402
from kvfold.engine import reference as engine_reference  # noqa: E402
from kvfold.engine.on_torch import TorchEngine  # noqa: E402
from kvfold.engine.request import LayerShape  # noqa: E402
from kvfold.errors import CacheMisuse, NonFiniteInput, UnsupportedHeadDim  # noqa: E402
from kvfold.packing.layout import PageLayout  # noqa: E402
from kvfold.packing.on_torch import PageCodec  # noqa: E402
from kvfold.rotation.reference import stream  # noqa: E402

CPU = torch.device("cpu")
HEADS, LAYER, SEED = 2, 3, 17
SCALES = ("norm", "unbiased", "least-squares", "match")
CANONICAL = [("mse", b) for b in range(1, 9)] + [("uniform", 2)]
DIMS = (8, 64, 80, 96, 112, 128, 256)
FAMILY = [
    SideSpec("mse", 3, "unbiased", "dense"),
    SideSpec("qjl", 1),
    SideSpec("qjl", 1, sketch="orthogonal"),
    SideSpec("prod", 1),
    SideSpec("prod", 2),
    SideSpec("prod", 4, rotation="dense"),
    SideSpec("prod", 3, sketch="orthogonal"),
    SideSpec("polar", 3.875),
    SideSpec("polar", 3.875, rotation="dense"),
    SideSpec("split", 2.5, rotation="dense"),
    SideSpec("split", 3.5),
    SideSpec("split", 3.5, "unbiased", search=3),
]


def name(spec: SideSpec) -> str:
    return f"{spec.codec}-{spec.bits:g}-{spec.rotation}-{spec.sketch}-{spec.scale}"


def vectors(seed: int, *shape: int) -> np.ndarray:
    """Gaussian vectors whose lengths differ by e^3 and of which one is zero, float32."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) * np.exp(random.uniform(-1.5, 1.5, (*shape[:-1], 1)))
    x[..., 0, :] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("codec", "bits"), CANONICAL)
def test_codes_scales_and_bytes_equal_the_canonical_encoder(codec: str, bits: int, dim: int) -> None:
    """All four scales and both searches; a page of each is compared byte for byte, means and padding included."""
    k, v = vectors(dim, HEADS, 128, dim), vectors(dim + bits, HEADS, 128, dim)
    cases = [(scale, 1) for scale in SCALES] + [(scale, 3) for scale in SCALES[1:]]
    for scale, search in cases:
        side = SideSpec(codec, bits, scale, search=search)
        spec = CacheSpec(side, side, seed=SEED)
        engine = TorchEngine(spec, LayerShape(LAYER, HEADS, dim, 4), torch.float32, CPU)
        row = torch.full((engine.page_bytes,), 0x5A, dtype=torch.uint8)
        state = (None, None)
        engine.fold(torch.from_numpy(k)[None], torch.from_numpy(v)[None], True, [row], state)
        expected = engine_reference.fold(spec, LAYER, k, v, first_page=True)
        np.testing.assert_array_equal(row.numpy(), expected, err_msg=f"{scale} {search}")
        k_hat, v_hat = engine.unfold(row[None], state)
        for ours, theirs in zip((k_hat, v_hat), engine_reference.unfold(spec, LAYER, expected, k), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6 * abs(theirs).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_raw_pages_are_the_models_own_bytes(dtype: type) -> None:
    raw = SideSpec("raw", 16)
    spec = CacheSpec(raw, raw, centre=False)
    k, v = vectors(1, HEADS, 128, 8).astype(dtype), vectors(2, HEADS, 128, 8).astype(dtype)
    engine = TorchEngine(spec, LayerShape(LAYER, HEADS, 8, 4), torch.from_numpy(k).dtype, CPU)
    row = torch.zeros(engine.page_bytes, dtype=torch.uint8)
    engine.fold(torch.from_numpy(k)[None], torch.from_numpy(v)[None], True, [row], (None, None))
    expected = engine_reference.fold(spec, LAYER, k, v, first_page=True)
    np.testing.assert_array_equal(row.numpy(), expected)
    np.testing.assert_array_equal(engine_reference.unfold(spec, LAYER, expected, k)[0], k)


def encoded(spec: SideSpec, dim: int) -> tuple:
    """(torch codec, its state, x [2, H, 64, D], its fields)."""
    x = torch.from_numpy(vectors(dim, 2, HEADS, 64, dim))
    codec = build(spec, SEED, LAYER, 1, range(HEADS), dim, False, torch.float32, CPU)
    state = codec.freeze(x.transpose(0, 1).flatten(1, 2))
    return codec, state, x, codec.encode(x, state)


def references(spec: SideSpec, dim: int) -> list:
    return [reference.build(spec, dim, stream(SEED, LAYER, head, 1)) for head in range(HEADS)]


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("spec", FAMILY, ids=name)
def test_the_family_equals_its_float64_references(spec: SideSpec, dim: int) -> None:
    _, state, x, ours = encoded(spec, dim)
    for head, exact in enumerate(references(spec, dim)):
        x64 = x[:, head].double().numpy()
        frozen = exact.freeze(x64.reshape(-1, dim))
        if frozen is not None:
            np.testing.assert_array_equal(state[head].numpy(), frozen)
        for field, theirs in exact.encode(x64, frozen).items():
            got = ours[field][:, head].numpy()
            assert (got.dtype, got.shape) == (theirs.dtype, theirs.shape)
            if theirs.dtype == np.float16:
                # A first-stage code on a threshold moves gamma by more than a rounding: such vectors are counted.
                close = np.isclose(got.astype(float), theirs.astype(float), rtol=2.0**-10, atol=2.0**-24)
                assert (~close).sum() <= 1
            else:
                # One code on a boundary; then, in `prod`, a few signs of that vector's residual.
                assert (got != theirs).sum() <= 4


@pytest.mark.parametrize("dim", [32, 96, 128])
@pytest.mark.parametrize("spec", FAMILY, ids=name)
def test_the_basis_is_linear_and_decodes_what_the_reference_decodes(spec: SideSpec, dim: int) -> None:
    """Through packed bytes: lift(z) is the reference's x_hat, and <project(q), z> = <q, lift(z)>."""
    codec, state, x, fields = encoded(spec, dim)
    layout = PageLayout(codec.fields, codec.fields, HEADS, dim, False)
    pages = PageCodec(layout)
    # Pages have 128 tokens; both halves hold the same ones.
    twice = {field: torch.cat([value, value], dim=2) for field, value in fields.items()}
    rows = torch.zeros(len(x), layout.page_bytes, dtype=torch.uint8)
    pages.write(rows, "value", twice)
    z = codec.decode({f.name: pages.planes_of(rows, "value", f) for f in codec.fields}, state)
    assert z.shape == (len(x), HEADS, 128, codec.latent)
    z = z[:, :, :64].transpose(0, 1).flatten(1, 2)
    x_hat = codec.lift(z, state)
    for head, exact in enumerate(references(spec, dim)):
        held = {field: value[:, head].numpy() for field, value in fields.items()}
        frozen = None if state is None else state[head].numpy()
        theirs = exact.decode(held, frozen).reshape(-1, dim)
        np.testing.assert_allclose(x_hat[head].numpy(), theirs, atol=1e-6 * abs(theirs).max())
    q = torch.from_numpy(vectors(5, HEADS, 7, dim))
    scores, direct = codec.project(q, state) @ z.mT, q @ x_hat.mT
    assert (scores - direct).abs().max() <= 2e-6 * direct.abs().max()


def test_a_split_codec_without_channels_says_so() -> None:
    codec = build(SideSpec("split", 2.5), SEED, LAYER, 0, range(HEADS), 64, False, torch.float32, CPU)
    with pytest.raises(CacheMisuse, match="outlier channels"):
        codec.encode(torch.zeros(1, HEADS, 1, 64), None)


@pytest.mark.parametrize(
    ("codec", "bits", "dim"), [("polar", 3.875, 40), ("split", 3.5, 16), ("mse", 3, 4), ("qjl", 1, 6)]
)
def test_head_dims_without_a_form_are_refused(codec: str, bits: float, dim: int) -> None:
    with pytest.raises(UnsupportedHeadDim, match=str(dim)):
        build(SideSpec(codec, bits), SEED, LAYER, 0, range(HEADS), dim, False, torch.float32, CPU)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
@pytest.mark.parametrize("spec", [*FAMILY, SideSpec("mse", 3), SideSpec("uniform", 2, "unbiased")], ids=name)
def test_vectors_that_do_not_fit_a_page_are_refused_and_nothing_is_written(spec: SideSpec, bad: float) -> None:
    """1e8 per coordinate is finite but too long for a float16 scale."""
    cache = CacheSpec(spec, spec, 0, 0, False)
    engine = TorchEngine(cache, LayerShape(LAYER, HEADS, 64, 4), torch.float32, CPU)
    x = torch.from_numpy(vectors(9, 1, HEADS, 128, 64))
    y = x.clone()
    y[0, 1, 77] = bad
    state = engine.freeze(x[0], x[0])
    row = torch.full((engine.page_bytes,), 0x33, dtype=torch.uint8)
    with pytest.raises(NonFiniteInput, match="value vector"):
        engine.fold(x, y, False, [row], state)
    assert (row == 0x33).all()
