"""The 2.5- and 3.5-bit forms of TurboQuant (arXiv 2504.19874, section 4.3): outlier channels get one bit more.

Two independent quantizers, each with its own rotation, its own stored scale and the codebook of its own dimension: the
sub-vectors live on spheres of D/4 and 3D/4 dimensions, and the codebook of D would be too narrow for both by sqrt(D/d).
Outlier channels are the D/4 of largest L2 norm over a sequence's first long call, frozen per KV head.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfold.codec.fields import Fields
from kvfold.codec.heads import Exact
from kvfold.errors import CacheMisuse

F64 = NDArray[np.float64]
I16 = NDArray[np.int16]

OUTLIER_STREAM, REGULAR_STREAM = 2, 3  # paths from a head's stream key to the two rotations


def not_frozen() -> CacheMisuse:
    return CacheMisuse(
        "codec 'split' does not know its outlier channels yet", "Call freeze on the sequence's first tokens"
    )


class Split:
    """One head in float64; state is the ascending list of outlier channels."""

    def __init__(self, outlier: Exact, regular: Exact) -> None:
        self.outlier, self.regular = outlier, regular

    def freeze(self, x: F64) -> I16:
        """x [T, D] -> outlier channels int16 [D/4], ascending. Of equal norms the lower channel wins."""
        norms = np.linalg.norm(x, axis=0)
        return np.sort(np.argsort(-norms, kind="stable")[: self.outlier.dim]).astype(np.int16)

    def _channels(self, state: I16 | None) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        if state is None:
            raise not_frozen()
        rest = np.setdiff1d(np.arange(self.outlier.dim + self.regular.dim), state)
        return state.astype(np.intp), rest

    def encode(self, x: F64, state: I16 | None = None) -> Fields:
        """Codes and scale of each sub-vector, under `outlier_` and `regular_`."""
        high, low = self._channels(state)
        out = {f"outlier_{name}": value for name, value in self.outlier.encode(x[..., high]).items()}
        out.update({f"regular_{name}": value for name, value in self.regular.encode(x[..., low]).items()})
        return out

    def decode(self, fields: Fields, state: I16 | None = None) -> F64:
        high, low = self._channels(state)
        x = np.empty((*fields["outlier_codes"].shape[:-1], len(high) + len(low)))
        for at, part, name in ((high, self.outlier, "outlier"), (low, self.regular, "regular")):
            x[..., at] = part.decode({"codes": fields[f"{name}_codes"], "scale": fields[f"{name}_scale"]})
        return x
