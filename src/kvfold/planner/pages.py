"""Bytes of one page as the engine that would run lays it out."""

from __future__ import annotations

import functools
from importlib.util import find_spec

from kvfold.codec.fields import fields
from kvfold.config import CacheSpec
from kvfold.packing.layout import PageLayout
from kvfold.planner.model import FLOAT32_BYTES, Attention


def spec_of(spec: CacheSpec, attention: Attention) -> CacheSpec:
    """What a layer makes of a cache's spec."""
    if attention.latent:
        return spec.for_latents()
    return spec.for_windows() if attention.variant.reach is not None else spec


@functools.cache
def page_of(
    spec: CacheSpec, attention: Attention, dtype_bytes: int, backend: str, device: str, layer: int = 0
) -> tuple[int, str]:
    """(bytes of a page, name of the engine). Without torch there is no engine, and the answer is the canonical page. layer: its
    number, which matters to tuned profiles alone.

    Raises NoImplementation or UnsupportedHeadDim as the cache would.
    """
    spec = spec_of(spec, attention)
    if not find_spec("torch"):
        key = fields(spec.key, attention.key_dim, dtype_bytes)
        value = fields(spec.value, attention.value_dim, dtype_bytes)
        return PageLayout(key, value, attention.kv_heads, attention.key_dim, spec.centre).page_bytes, "none"
    import torch

    from kvfold.engine.request import LayerShape
    from kvfold.engine.select import make_engine

    dtype = torch.float32 if dtype_bytes == FLOAT32_BYTES else torch.bfloat16
    shape = LayerShape(
        layer,
        attention.kv_heads,
        attention.key_dim,
        dtype_bytes,
        variant=attention.variant,
        value_dim=attention.value_dim,
    )
    engine = make_engine(backend, spec, shape, dtype, torch.device(device))
    return engine.page_bytes, engine.name
