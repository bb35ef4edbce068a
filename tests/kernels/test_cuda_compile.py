"""Every architecture compiles every kernel within its budget of registers and spills. Needs NVRTC, no GPU."""

from __future__ import annotations

import re

import pytest

from kvfold.engine.cuda import driver
from kvfold.engine.cuda.arguments import plan_rings, shared_limit
from kvfold.engine.cuda.folding import parities_of
from kvfold.engine.cuda.formats import TRELLIS, book_of
from kvfold.errors import NoImplementation

# Bytes of register spills a variant may have. The page loop itself holds almost none (see docs/gpu.md); what spills lies
# before and after it. fold holds 64 numbers a thread and spills up to 16 words of edges and addresses besides.
SPILL_BUDGET = {"decode.cu": 320, "fold.cu": 64, "unfold.cu": 0}
CAPABILITY = {"80": (8, 0), "86": (8, 6), "90": (9, 0), "100": (10, 0), "120": (12, 0)}
ARCHS = tuple(CAPABILITY)
FORMATS = ((4, 4), (3, 3), (1, 1), (3, 1), (17, 15), (26, 24))

pytestmark = pytest.mark.slow


def resources(name: str, variant: tuple[int, ...], arch: str) -> tuple[int, int]:
    """(registers, bytes of spill stores) of the kernel's entry."""
    try:
        driver.nvrtc()
    except NoImplementation as error:
        pytest.skip(error.message)
    _, report = driver.compile_text(name, driver.specialised(name, variant), arch)
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill stores", report)]
    return max(int(x) for x in re.findall(r"Used (\d+) registers", report)), max(spills, default=0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dim", "groups"), [(64, 1), (128, 1), (256, 1), (128, 2), (128, 4)])
def test_decode_fits(arch: str, dim: int, groups: int) -> None:
    for key, value in FORMATS:
        warps, slots = plan_rings(dim, (key, value), True, groups, shared_limit(CAPABILITY[arch]))
        variant = (dim, key, value, 1, groups, warps, slots, int(CAPABILITY[arch] >= (9, 0)), 0, 0)
        registers, spilled = resources("decode.cu", variant, arch)
        assert registers * warps * 32 <= 65536, (variant, registers)
        assert spilled <= SPILL_BUDGET["decode.cu"], (variant, spilled)


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("rates", [(1, 3.5), (3.5, 1)])
def test_rates_far_from_each_other_fit(arch: str, rates: tuple[float, float]) -> None:
    """Layers with bits of their own bring pairs that no profile has."""
    key, value = (TRELLIS + int(2 * rate) for rate in rates)
    warps, slots = plan_rings(128, (key, value), True, 1, shared_limit(CAPABILITY[arch]))
    variant = (128, key, value, 1, 1, warps, slots, int(CAPABILITY[arch] >= (9, 0)), 0, 0)
    registers, spilled = resources("decode.cu", variant, arch)
    assert registers * warps * 32 <= 65536, registers
    assert spilled <= SPILL_BUDGET["decode.cu"], spilled


@pytest.mark.parametrize("arch", ARCHS)
def test_logits_fit(arch: str) -> None:
    for dim, groups, key, value in ((64, 1, 17, 15), (128, 1, 4, 4), (128, 4, 1, 1), (256, 2, 3, 3)):
        warps, slots = plan_rings(dim, (key, value), True, groups, shared_limit(CAPABILITY[arch]))
        variant = (dim, key, value, 1, groups, warps, slots, int(CAPABILITY[arch] >= (9, 0)), 0, 4)
        registers, spilled = resources("logits.cu", variant, arch)
        assert registers * warps * 32 <= 65536, (variant, registers)
        assert spilled == 0, (variant, spilled)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["fold.cu", "unfold.cu"])
def test_fold_and_unfold_stay_in_registers(arch: str, name: str) -> None:
    for dim in (64, 128, 256):
        for key, value in FORMATS:
            if name == "fold.cu" and max(key, value) > TRELLIS:
                continue  # fold_trellis.cu
            registers, spilled = resources(name, (dim, key, value, 1, 0), arch)
            assert registers <= 128, (dim, key, value, registers)
            assert spilled <= SPILL_BUDGET[name], (dim, key, value, spilled)


@pytest.mark.parametrize("arch", ARCHS)
def test_entering_fits(arch: str) -> None:
    for dim in (64, 128, 256):
        registers, spilled = resources("enter.cu", (dim,), arch)
        assert (registers <= 64, spilled) == (True, 0), (dim, registers, spilled)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("widths", [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4)])
def test_search_fits(arch: str, widths: tuple[int, int]) -> None:
    registers, spilled = resources("viterbi.cu", (128, *widths), arch)
    assert (registers <= 128, spilled) == (True, 0), (registers, spilled)


@pytest.mark.parametrize(
    ("arch", "dim", "fmt", "side"),
    [("90", 64, 12, 0), ("90", 128, 14, 0), ("90", 256, 17, 0), ("80", 128, 17, 0), ("120", 128, 17, 0)]
    + [("90", 128, 24, 1), ("90", 64, 26, 0), ("80", 256, 26, 1), ("120", 128, 24, 0)],
)
def test_trellis_fold_fits(arch: str, dim: int, fmt: int, side: int) -> None:
    registers, spilled = resources("fold_trellis.cu", (dim, fmt, fmt, 1, 0, side, *parities_of(book_of(fmt))), arch)
    assert (registers <= 255, spilled) == (True, 0), (registers, spilled)
