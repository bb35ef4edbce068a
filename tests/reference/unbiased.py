"""A statistical assertion that knows how small an error it can see."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

SIGMAS = 4.0  # a correct estimator fails once in 16,000 runs
POWER = 3.0  # further standard errors: a shrink of `detect` is then caught in 999 runs of 1,000


def slope(estimate: F64, truth: F64) -> tuple[float, float]:
    """Regression of estimate on truth through the origin, and its standard error."""
    square = float(truth @ truth)
    fitted = float(estimate @ truth) / square
    residual = estimate - fitted * truth
    return fitted, math.sqrt(float(residual @ residual) / len(truth) / square)


def assert_unbiased(estimate: F64, truth: F64, detect: float = 0.02) -> None:
    """The slope is 1 within 4 standard errors, of a sample large enough to see a slope of 1 - detect.

    Fails with the number of pairs it needs when the sample is too small.
    """
    fitted, error = slope(estimate, truth)
    needed = math.ceil(len(truth) * ((SIGMAS + POWER) * error / detect) ** 2)
    assert needed <= len(truth), f"{len(truth)} pairs cannot show a bias of {detect:.1%}: use at least {needed}"
    assert abs(fitted - 1) < SIGMAS * error, f"slope {fitted:.5f} is not 1 within {SIGMAS:g} x {error:.5f}"
