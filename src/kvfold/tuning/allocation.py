"""From moments to bases and bits: channels of equal standing across heads, layers and sides, and where bits buy most."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor

from kvfold.codebook.basis import MAX_WIDTH, Basis
from kvfold.rotation.on_torch import hadamard
from kvfold.tuning.statistics import Moments

GROUP = 16  # channels that share their bits, mixed by a Hadamard transform so that their values are near normal
# Squared error of the codes of 0 to 4 bits, relative to a channel's energy.
ERROR = (1.0, 0.2689, 0.0717, 0.0182, 0.00487)
SHRINK = {"key": 0.1, "value": 0.1}  # towards the diagonal, of both moments
# Squared error of plain trellis codes by their bits, relative to a vector's energy; of those that every engine has.
PLAIN_ERROR = {1.0: 0.282, 1.5: 0.145, 2.0: 0.0748, 2.5: 0.0384, 3.0: 0.019, 3.5: 0.0099}
LEAST_COST = 0.02  # of the mean one: another text may find a cheap layer dearer


def root(m: Tensor, power: float) -> Tensor:
    """Symmetric positive [H, D, D] to a power."""
    values, vectors = torch.linalg.eigh(m)
    floor = 1e-12 * values[:, -1:].clamp(min=1e-30)
    return (vectors * values.clamp(min=floor).pow(power)[:, None, :]) @ vectors.mT


def shrunk(m: Tensor, share: float) -> Tensor:
    """[H, D, D] moved towards its diagonal, with a floor under it."""
    diagonal = m.diagonal(dim1=-2, dim2=-1)
    floor = 1e-3 * diagonal.mean(-1, keepdim=True)
    return (1 - share) * m + torch.diag_embed(share * diagonal + floor)


def principal(moments: Moments, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(forward, inverse, energy, cost): u = forward @ x has the identity as its spread; energy [H, D], descending, is what losing
    a channel costs, in nats per prediction; cost = the root of F, [H, D, D]."""
    spread = shrunk(moments.spread / moments.tokens, share)
    price = shrunk(moments.cost / moments.positions / 2, share)
    high, low = root(price, 0.5), root(price, -0.5)
    energy, vectors = torch.linalg.eigh(high @ spread @ high)
    energy, vectors = energy.flip(-1).clamp(min=1e-30), vectors.flip(-1)
    sigma = energy.sqrt()
    return vectors.mT @ high / sigma[..., None], low @ vectors * sigma[:, None], energy, high


def allocate(energy: Tensor, bits: float) -> Tensor:
    """energy [N, G], what losing each group of channels of each head costs -> widths uint8 [N, G], `bits` on average.

    Greedy: every bit goes where it saves most, which is best for the convex ERROR.
    """
    flat = energy.flatten().tolist()
    widths = [0] * len(flat)
    heap = [(-e * (ERROR[0] - ERROR[1]), i) for i, e in enumerate(flat)]
    heapq.heapify(heap)
    for _ in range(round(bits * len(flat))):
        _, i = heapq.heappop(heap)
        widths[i] += 1
        if widths[i] < MAX_WIDTH:
            heapq.heappush(heap, (-flat[i] * (ERROR[widths[i]] - ERROR[widths[i] + 1]), i))
    return torch.tensor(widths, dtype=torch.uint8).view_as(energy)


def bases(moments: dict[tuple[int, str], Moments], bits: float, sides: tuple[str, ...]) -> dict[tuple[int, str], Basis]:
    """Bases of the named sides of all layers with `bits` per value on average over all of them."""
    places = [p for p in moments if p[1] in sides]
    found = {p: principal(moments[p], SHRINK[p[1]]) for p in places}
    groups = {p: found[p][2].unflatten(-1, (-1, GROUP)).sum(-1) for p in places}
    widths = allocate(torch.cat([g.flatten() for g in groups.values()])[:, None], bits)
    out, at = {}, 0
    for p in places:
        forward, inverse, energy, cost = found[p]
        own = widths[at : at + groups[p].numel()].view(groups[p].shape)
        at += groups[p].numel()
        out[p] = _mixed(forward, inverse, energy, cost, own)
    return out


def by_layer(moments: dict[tuple[int, str], Moments], bits: float) -> tuple[tuple[float, float], ...]:
    """Bits of keys and values of every layer, in order, `bits` per value in all, for plain trellis codes: these turn a vector
    before they code it, so that its error is even over its channels and costs their mean."""
    sizes = {place: m.spread.shape[0] * m.spread.shape[-1] for place, m in moments.items()}
    costs = {place: m.lost / m.positions / 2 / m.spread.shape[-1] for place, m in moments.items()}
    least = LEAST_COST * sum(costs.values()) / len(costs)
    widths = shared_out({p: max(c, least) for p, c in costs.items()}, sizes, bits)
    return tuple((widths[i, "key"], widths[i, "value"]) for i in sorted({layer for layer, _ in moments}))


def shared_out(costs: dict[Any, float], sizes: dict[Any, int], bits: float) -> dict[Any, float]:
    """Widths of PLAIN_ERROR by place, at most `bits` per value in all: each step goes where it saves most for its size, which is
    best for a convex error. costs: of losing everything. sizes: values of a token."""
    ladder = list(PLAIN_ERROR)
    at = dict.fromkeys(costs, 0)
    left = (bits - ladder[0]) * sum(sizes.values())
    while True:
        saved = {
            p: costs[p] * (PLAIN_ERROR[ladder[i]] - PLAIN_ERROR[ladder[i + 1]]) / sizes[p]
            for p, i in at.items()
            if i + 1 < len(ladder) and (ladder[i + 1] - ladder[i]) * sizes[p] <= left
        }
        if not saved:
            return {p: ladder[i] for p, i in at.items()}
        best = max(saved, key=saved.__getitem__)
        left -= (ladder[at[best] + 1] - ladder[at[best]]) * sizes[best]
        at[best] += 1


def _mixed(forward: Tensor, inverse: Tensor, energy: Tensor, cost: Tensor, widths: Tensor) -> Basis:
    """Channels of a group mixed: each then has the group's mean energy. y = sqrt(energy) u is mixed, not u, so that the cost of
    an error stays the sum of its channels'."""
    dim = energy.shape[-1]
    mean = energy.unflatten(-1, (-1, GROUP)).mean(-1)
    weight = mean.sqrt().repeat_interleave(GROUP, -1)
    sigma = energy.sqrt()
    mix = torch.block_diag(*[hadamard(torch.eye(GROUP)).double() / GROUP**0.5] * (dim // GROUP))
    forward = (mix @ (forward * sigma[..., None])) / weight[..., None]
    inverse = (inverse / sigma[:, None]) @ mix.T * weight[:, None]
    return Basis(forward.float(), inverse.float(), widths.repeat_interleave(GROUP, -1), weight.float(), cost.float())
