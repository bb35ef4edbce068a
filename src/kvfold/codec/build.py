"""A side's spec to the codec that runs it in torch: the one place that knows all codecs."""

from __future__ import annotations

import torch

from kvfold.codebook.basis import SIDES, find
from kvfold.codec.on_torch import Raw, Scalar, TorchCodec
from kvfold.codec.torch_polar import Polar
from kvfold.codec.torch_sketch import Prod, Qjl
from kvfold.codec.torch_split import Split
from kvfold.codec.torch_trellis import Trellis
from kvfold.codec.torch_tuned import Tuned
from kvfold.config import TRELLIS_CODECS, TUNED, SideSpec
from kvfold.rotation.reference import stream


def build(
    spec: SideSpec,
    seed: int,
    layer: int,
    side: int,
    heads: range,
    head_dim: int,
    centred: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> TorchCodec:
    """side: 0 keys, 1 values; centred: without their means. Every KV head has its own stream of the seed, so a head-sharded
    cache gets the same codes."""
    keys = [stream(seed, layer, head, side) for head in heads]
    if spec.codec == "raw":
        return Raw(head_dim, dtype)
    if spec.codec in ("mse", "uniform"):
        return Scalar(spec, head_dim, keys, device)
    if spec.codec == "qjl" or (spec.codec == "prod" and spec.bits == 1):
        return Qjl(spec, head_dim, keys, device)
    if spec.codec == "prod":
        return Prod(spec, head_dim, keys, device)
    if spec.codec == "polar":
        return Polar(spec, head_dim, keys, device)
    if spec.codec == TUNED:
        return Tuned(spec, head_dim, keys, find(spec.basis, layer, SIDES[side]), centred, device)
    if spec.codec in TRELLIS_CODECS:
        return Trellis(spec, head_dim, keys, device)
    return Split(spec, head_dim, keys, device)
