"""TurboQuant_prod, Algorithm 2 of arXiv 2504.19874: unbiased inner products.

    idx = Quant_mse(x) at b - 1 bits,  r = x - DeQuant_mse(idx),  qjl = sign(S r),  gamma = |r|,
    x_hat = DeQuant_mse(idx) + (sqrt(pi/2) / D) gamma S^T qjl.

The stated b includes the sign. The residual is taken from what the page holds (float16 scale included), so that what
rounding took away is sketched too. At b = 1 there is no first stage and this is QJL.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfold.codec.fields import Fields
from kvfold.codec.heads import Exact
from kvfold.codec.qjl import Qjl

F64 = NDArray[np.float64]


class Prod:
    """One head in float64, b >= 2: a scalar quantizer and the sketch of what it leaves."""

    def __init__(self, first: Exact, residual: Qjl) -> None:
        self.first, self.residual = first, residual

    def freeze(self, x: F64) -> None:
        return None

    def encode(self, x: F64, state: None = None) -> Fields:
        """`codes` and `scale` of the first stage, `signs` and `gamma` of the residual."""
        kept = self.first.encode(x)
        sketched = self.residual.encode(x - self.first.decode(kept))
        return {**kept, "signs": sketched["signs"], "gamma": sketched["norm"]}

    def decode(self, fields: Fields, state: None = None) -> F64:
        return self.first.decode(fields) + self.residual.decode({"signs": fields["signs"], "norm": fields["gamma"]})
