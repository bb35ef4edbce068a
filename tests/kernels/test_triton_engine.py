"""The Triton engine where it differs from the others: what only it takes, tiles of columns, and which requests it refuses.

The test body of every engine is test_attend; what is here is small enough for Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_attend import PRECISION, check, numbers, place, worst
from torch import Tensor

from kvfold.codebook.trellis import code
from kvfold.codec.torch_trellis import viterbi
from kvfold.config import CacheSpec, SideSpec
from kvfold.dispatch import ENGINES, choose
from kvfold.engine import select
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView
from kvfold.engine.variant import PLAIN, Reach, Variant
from kvfold.errors import NoImplementation

HEADS = 2
SMALL = CacheSpec(SideSpec("mse", 3, "unbiased"), SideSpec("mse", 4, "least-squares"), window=0, sinks=4)
TRELLIS = CacheSpec(SideSpec("trellis", 3.5, "unbiased"), SideSpec("trellis", 2, "least-squares"), window=0)
MIXED = CacheSpec(SideSpec("trellis", 1.5), SideSpec("uniform", 2), window=0, centre=False)


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize(
    ("spec", "dim", "groups", "new"),
    [(SMALL, 96, 3, 2), (TRELLIS, 64, 1, 1), (MIXED, 80, 2, 1), (CacheSpec(window=64), 128, 4, 1)],
    ids=["mse-96", "trellis-64", "mixed-80", "window-128"],
)
def test_decode_of_uneven_rows(name: str, spec: CacheSpec, dim: int, groups: int, new: int) -> None:
    check(name, spec, dim, [270, 3, 140], new, groups, trim=7, pads=[0, new, new - 1])


def layer(
    name: str, variant: Variant, dims: tuple[int, int], past: list[tuple[int, int]], new: int, groups: int
) -> Tensor:
    """Output of an engine over fixed pages and tokens, softcapped and with sink logits as the variant says."""
    device, dtype = place(name)
    shape = LayerShape(1, HEADS, dims[0], dtype.itemsize, variant=variant, value_dim=dims[1])
    engine = select.make_engine(name, SMALL, shape, dtype, device)
    rows = []
    for folded, recent in past:
        pages = -(-folded // 128)
        store = torch.zeros(max(1, pages), engine.page_bytes, dtype=torch.uint8, device=device)  # type: ignore[attr-defined]
        x = [numbers((pages, HEADS, 128, d), s).to(device) for s, d in zip((1, 2), dims, strict=True)]
        if pages:
            engine.fold(*x, True, list(store), (None, None))
        exact = [numbers((HEADS, n, d), 3).to(device) for n in (SMALL.sinks, recent) for d in dims]
        rows.append(SequenceView([store] if pages else [], folded, *exact, 0, None, None))
    q, k, v = (
        numbers((len(past), h, new, d), s).to(device)
        for s, h, d in ((5, HEADS * groups, dims[0]), (6, HEADS, dims[0]), (7, HEADS, dims[1]))
    )
    logits = numbers((HEADS * groups,), 8).to(device) if variant.sink_logits else None
    out = engine.attend(AttendRequest(3 * q, k, v, dims[0] ** -0.5, rows, variant.softcap, logits))
    return out.cpu()


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize(
    ("variant", "dims", "new", "groups"),
    [
        (Variant(3.0, True), (64, 64), 1, 4),
        (Variant(reach=Reach(150)), (64, 64), 3, 2),
        (Variant(reach=Reach(20)), (64, 64), 1, 2),
        (PLAIN, (64, 32), 1, 2),
        (Variant(5.0, reach=Reach(90)), (64, 64), 35, 2),  # two tiles of columns
    ],
    ids=str,
)
def test_variants(name: str, variant: Variant, dims: tuple[int, int], new: int, groups: int) -> None:
    """Against the torch engine, which test_attend compares with the definitions."""
    past = [(256, 30), (0, 9), (130, 0)]
    got, want = (layer(n, variant, dims, past, new, groups) for n in (name, "torch"))
    assert worst(got - want) <= (PRECISION[name] + 1e-5) * 4


@pytest.mark.parametrize("window", [1, 3, 60, 200])
def test_windows_of_the_torch_engine(window: int) -> None:
    """Against the definition in float64, over what pages unfold to."""
    engine = TorchEngine(
        SMALL, LayerShape(1, HEADS, 64, 4, variant=Variant(reach=Reach(window))), torch.float32, torch.device("cpu")
    )
    k, v, q = (numbers((HEADS, 256 + 40 + 5, 64), s) for s in (1, 2, 3))
    rows = torch.zeros(2, engine.page_bytes, dtype=torch.uint8)
    engine.fold(*(x[:, :256].unflatten(1, (2, 128)).transpose(0, 1) for x in (k, v)), True, list(rows), (None, None))
    view = SequenceView([rows], 256, k[:, :4], v[:, :4], k[:, 256:296], v[:, 256:296], 0, None, None)
    out = engine.attend(AttendRequest(q[None, :, 296:], k[None, :, 296:], v[None, :, 296:], 0.125, [view]))
    for x, y in zip((k, v), engine.unfold(rows, (None, None)), strict=True):
        x[:, 4:256] = y[:, 4:]
    t = torch.arange(301)
    at = torch.arange(296, 301)[:, None]
    scores = (q[:, 296:].double() * 0.125) @ k.double().mT
    scores = scores.masked_fill((t > at) | (t <= at - window), -math.inf)
    assert worst(out[0] - scores.softmax(-1) @ v.double()) < 1e-5


def test_it_is_chosen_for_what_the_cuda_engine_does_not_take() -> None:
    """As far as a machine without a GPU can tell: head_dim 96, softcaps, sink logits, a sliding window, dense rotations."""
    device = torch.device("cuda")
    dense = CacheSpec(SideSpec("mse", 3, rotation="dense"), SideSpec("mse", 3))
    for spec, shape in (
        (SMALL, LayerShape(0, 8, 96, 2)),
        (SMALL, LayerShape(0, 8, 128, 2, variant=Variant(50.0, True))),
        (SMALL, LayerShape(0, 8, 128, 2, variant=Variant(reach=Reach(4096)))),
        (TRELLIS, LayerShape(0, 8, 128, 2, value_dim=64)),
        (dense, LayerShape(0, 8, 128, 2)),
    ):
        assert choose("engine", ENGINES, "auto", spec, shape, torch.bfloat16, device).name == "triton"


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (SMALL, LayerShape(0, 8, 72, 2), "multiple of 16"),
        (SMALL, LayerShape(0, 8, 512, 2), "up to 256"),
        (SMALL, LayerShape(0, 8, 128, 2, variant=Variant(latent=True)), "latent"),
        (CacheSpec(SideSpec("prod", 3)), LayerShape(0, 8, 128, 2), "no kernel for key codec 'prod' at 3 bits"),
        (SMALL, LayerShape(0, 8, 128, 2), "device is cpu"),
    ],
)
def test_what_it_refuses(spec: CacheSpec, shape: LayerShape, reason: str) -> None:
    with pytest.raises(NoImplementation, match=reason):
        select.make_engine("triton", spec, shape, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 3.5, 4])
def test_the_search_of_trellis_codes(name: str, bits: float) -> None:
    """The same symbols and states as the canonical search, with vectors that saturate the metrics among them."""
    from kvfold.engine.triton.viterbi import Search

    device, book = place(name)[0], code(bits)
    x = (numbers((9, 32), 1) * float(book.gain)).round().clamp(-book.clip, book.clip).int()
    x[0], x[1], x[2] = 0, book.clip, -book.clip
    found = Search(book, device)(x.to(device), book)
    for got, want in zip(found, viterbi(x, book), strict=True):
        assert torch.equal(got.cpu(), want)
