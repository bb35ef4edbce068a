"""transformers: the attention implementation `kvfold`, its masks, and `attach`.

A model calls `k, v = cache.update(k, v, layer)` and hands both, untouched, to the attention function of its
configuration. So a FoldedCache returns handles instead of tensors, and the attention function registered here attends
to the pages behind them. Masks are registered too: an unregistered name would silently drop padding. Stock caches keep
working: a call that brings tensors goes to the implementation the model had before.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.adapters.hf_families import NOT_FOLDED
from kvfold.engine.request import AttendRequest
from kvfold.engine.variant import Reach
from kvfold.errors import InvalidConfig, NotAttached, Unsupported
from kvfold.planner.architecture import variant_of

NAME = "kvfold"

# Arguments of an attention call that change its result and that folded attention does not implement.
REFUSED = ("position_bias", "output_attentions", "cache", "head_mask")
# Tensors that models pass along to every attention function and that do not change a folded one.
HARMLESS = ("position_ids", "cache_position", "position_embeddings", "input_ids", "attention_mask", "labels")

Runs = list[tuple[int, int]]  # columns of a row that hold padding, as (start, stop)


class Attends(Protocol):
    """A folded layer, as the attention function sees it."""

    @property
    def latent(self) -> bool: ...

    @property
    def reach(self) -> Reach | None: ...

    def attend(self, handle: Handle, call: AttendRequest, mask: LazyMask | None) -> Tensor: ...


class Handle:
    """Stands for one layer's keys, or values, between `update` and the attention function. Never a tensor."""

    __slots__ = ("call", "k", "layer", "reads", "v")

    def __init__(self, layer: Attends, call: int, k: Tensor, v: Tensor) -> None:
        self.layer, self.call, self.k, self.v = layer, call, k, v
        self.reads = 0  # attentions over it so far: later layers may read it, too

    def to(self, *args: Any, **kwargs: Any) -> Handle:
        """Itself: what hands keys from layer to layer may want them on the layer's device."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _not_attached(f"the model read .{name} of a folded cache's keys or values")

    def __getitem__(self, item: object) -> Any:
        raise _not_attached("the model sliced a folded cache's keys or values")

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Any:
        raise _not_attached(f"the model called {getattr(func, '__name__', func)} on a folded cache's keys or values")


def _not_attached(message: str) -> NotAttached:
    return NotAttached(
        message,
        "Call kvfold.attach(model) once before generating with a FoldedCache; a model that is attached and still does "
        "this changes keys after caching them and needs the stock cache",
    )


class LazyMask:
    """The arguments of a mask, which folded layers read as padding and stock layers turn into the mask itself."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._make, self.arguments = make, arguments
        self._known: tuple[int, int, Sequence[Runs], Reach | None, list[int]] | None = None

    ndim = 4  # of the mask itself: models within models are handed the outer one's, and look

    def contiguous(self) -> Any:
        """The mask itself: caches that can be compiled are given theirs beforehand, and none of them folds."""
        return None if self.dense is None else self.dense.contiguous()

    def __getitem__(self, item: Any) -> LazyMask:
        """For the last queries of a call alone: padding is still that of the whole call."""
        return LazyMask(functools.partial(_part_of, self._make, item), self.arguments)

    @functools.cached_property
    def dense(self) -> Any:
        """What the model's own implementation would have been given."""
        return self._make(**self.arguments)

    def pads(self, new: int, columns: int, holes: Sequence[Runs], reach: Reach | None = None) -> list[int]:
        """How many of the call's `new` columns are left padding, per row.

        holes: which of the `columns` before the call were padding, per row. Raises Unsupported for masks that are not
        causal with left padding and the layer's reach, or that hide other tokens of the past than they did.
        """
        if self._known is None or self._known[:4] != (new, columns, holes, reach):
            # Layers of one call share the mask and, as a rule, the past: it is read once.
            self._known = (new, columns, [list(runs) for runs in holes], reach, self._read(new, columns, holes, reach))
        return self._known[4]

    def _read(self, new: int, columns: int, holes: Sequence[Runs], reach: Reach | None) -> list[int]:
        if not _is_causal(self.arguments["mask_function"], reach):
            raise Unsupported("this model's attention mask is not plain causal", "Use the stock cache for it")
        pads = read_pads(self.arguments["attention_mask"], new, columns, holes)
        begun = [p and columns and runs != [(0, columns)] for p, runs in zip(pads, holes, strict=True)]
        if reach is not None and any(begun):
            # transformers counts a window in columns, padding included; here pads are not stored.
            raise Unsupported("padding lies between the tokens of a sliding window", "Pad only what begins a row")
        return pads


def _part_of(make: Callable[..., Any], item: Any, **arguments: Any) -> Any:
    """Part of a mask. It may not be left to sdpa's own causality, which counts queries from the first key."""
    return make(**{**arguments, "allow_is_causal_skip": False})[item]


def _is_causal(mask: Callable[..., Any], reach: Reach | None) -> bool:
    """Whether a mask function of transformers is causal and, with a reach, hides what lies before it, and nothing else."""
    if reach is None:
        return mask is causal_mask_function
    both = inspect.getclosurevars(mask).nonlocals.get("mask_functions", ())
    if len(both) != 2 or both[1] is not causal_mask_function:
        return False
    overlay, known = both[0], inspect.getclosurevars(both[0]).nonlocals
    kind, size = ("chunked_overlay", "chunk_size") if reach.chunked else ("sliding_window_overlay", "sliding_window")
    return bool(overlay.__qualname__.startswith(f"{kind}.") and known.get(size) == reach.tokens)


def read_pads(mask: Tensor | None, new: int, columns: int, holes: Sequence[Runs]) -> list[int]:
    """How many of a call's `new` columns are left padding, per row: see LazyMask.pads. mask: [B or 1, columns + new]."""
    batch = len(holes)
    if mask is None:
        return no_pads(holes)
    if mask.dim() != 2 or mask.shape[-1] != columns + new or len(mask) not in (1, batch):
        raise Unsupported(
            f"the attention mask {tuple(mask.shape)} does not cover {batch} rows of {columns} past and {new} new tokens",
            "Pass a 2D mask over all tokens so far, or none",
        )
    mask = mask.bool().expand(batch, -1)
    seen = torch.ones(batch, columns, dtype=torch.bool, device=mask.device)
    for row, runs in zip(seen, holes, strict=True):
        for start, stop in runs:
            row[start:stop] = False
    if not torch.equal(mask[:, :columns], seen):
        raise Unsupported(
            "the attention mask hides or shows other past tokens than in earlier calls",
            "Keep the mask of earlier calls as it was",
        )
    here = mask[:, columns:]
    if bool((here[:, 1:] < here[:, :-1]).any()):
        raise Unsupported(
            "the attention mask hides tokens that are not left padding of this call",
            "Pad on the left: padding_side='left' in the tokenizer",
        )
    return [int(p) for p in (~here).sum(-1).tolist()]


def no_pads(holes: Sequence[Runs]) -> list[int]:
    """Pads of a call without a mask."""
    if any(holes):
        raise Unsupported("earlier calls of this cache had padding and this one has no mask", "Pass the attention mask")
    return [0] * len(holes)


def _fallback_attention(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    if name == "eager":
        # Every modeling file has its own eager function; it is not in the registry.
        return getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    return ALL_ATTENTION_FUNCTIONS[name]


def _refuse(module: torch.nn.Module, query: Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise Unsupported for everything that would change the result and is not implemented."""
    stock = "Use the stock cache for this model or call"
    for name in REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise Unsupported(f"folded attention does not implement {name!r}", stock)
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and name not in HARMLESS:
            raise Unsupported(f"folded attention does not know the argument {name!r}", stock)
    if getattr(getattr(module, "config", None), "output_attentions", False):
        raise Unsupported("folded attention does not implement 'output_attentions'", stock)
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unsupported("a folded layer was asked for attention that is not causal", stock)
    if dropout:
        raise Unsupported("folded attention has no dropout", "Call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise no_gradients()


def no_gradients() -> Unsupported:
    return Unsupported("a folded cache has no gradients", "Run the call under torch.no_grad()")


def _attend(
    fallback: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: query [B, H * G, Q, D] -> ([B, Q, H * G, D], None)."""
    if not isinstance(key, Handle):
        dense = attention_mask.dense if isinstance(attention_mask, LazyMask) else attention_mask
        run = _fallback_attention(fallback, module)
        return run(module, query, key, value, dense, scaling=scaling, dropout=dropout, **kwargs)
    softcap, sink_logits = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    window, reach = kwargs.pop("sliding_window", None), key.layer.reach
    if window is not None and (reach is None or window != reach.tokens):
        raise Unsupported("folded attention does not implement 'sliding_window'", "Use the stock cache for this model")
    _refuse(module, query, dropout, kwargs)
    if attention_mask is not None and not isinstance(attention_mask, LazyMask):
        raise Unsupported("a ready-made 4D mask cannot be read by a folded cache", "Pass a 2D attention mask, or none")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    call = AttendRequest(query, key.k, key.v, scaling, [], softcap, sink_logits)
    if key.layer.latent:
        return _attend_to_latents(module, key, call, attention_mask), None
    return key.layer.attend(key, call, attention_mask).transpose(1, 2).contiguous(), None


def _attend_to_latents(module: Any, handle: Handle, call: AttendRequest, mask: LazyMask | None) -> Tensor:
    """Latent attention without expanding what is cached: [B, Q, H, numbers of a value].

    kv_b_proj makes keys and values of latents; here it turns queries into the latents' space, and outputs out of it.
    """
    weight = module.kv_b_proj.weight
    if type(weight) is not torch.nn.Parameter or not weight.is_floating_point():
        raise Unsupported("latent attention reads the weight of kv_b_proj, and it is quantized", "Leave it in 16 bits")
    nope = module.qk_nope_head_dim
    keys, values = weight.unflatten(0, (call.q.shape[1], -1)).split([nope, module.v_head_dim], dim=1)
    absorbed = torch.cat([call.q[..., :nope] @ keys, call.q[..., nope:]], dim=-1)
    out = handle.layer.attend(handle, replace(call, q=absorbed), mask)
    return (out @ values.mT).transpose(1, 2).contiguous()


def _keep_latents(model: torch.nn.Module) -> None:
    """Let the step that expands cached latents pass on handles of latents. For anything else it stays what it was."""
    kinds: set[Any] = {type(x) for x in model.modules() if hasattr(x, "expand_kv")}
    for kind in kinds:
        expand = kind.expand_kv
        if hasattr(expand, "passes_handles"):
            continue

        def expand_kv(self: Any, latents: Any, rotary: Any, expand: Callable[..., Any] = expand) -> Any:
            return (latents, rotary) if isinstance(latents, Handle) else expand(self, latents, rotary)

        expand_kv.passes_handles = True  # type: ignore[attr-defined]
        kind.expand_kv = expand_kv


def _mask(fallback: str, **arguments: Any) -> Any:
    """The registered mask function. A mask over all tokens so far is made when it is wanted, any other at once: caches
    with windows or of static size may count in tensors, in place, and hand masks through code that expects tensors."""
    if isinstance(outer := arguments.get("attention_mask"), LazyMask):
        return outer
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(fallback, _no_mask)
    past, new, length = (arguments.get(name) for name in ("q_offset", "q_length", "kv_length"))
    if isinstance(past, int) and isinstance(new, int) and length == past + new and not arguments.get("kv_offset"):
        return LazyMask(make, arguments)
    return make(**arguments)


def _no_mask(**arguments: Any) -> None:
    return None


def register(fallback: str = "sdpa") -> str:
    """Make `attn_implementation="kvfold"` known to transformers; returns the name for another fallback than sdpa."""
    name = NAME if fallback == "sdpa" else f"{NAME}_{fallback}"
    AttentionInterface.register(name, functools.partial(_attend, fallback))
    AttentionMaskInterface.register(name, functools.partial(_mask, fallback))
    return name


register()


def _implementation(model: Any) -> str:
    try:
        return str(model.config._attn_implementation or "eager")
    except AttributeError as error:
        raise InvalidConfig(
            f"{type(model).__name__} is not a transformers model",
            "Pass what AutoModelForCausalLM.from_pretrained returns",
        ) from error


def is_attached(model: Any) -> bool:
    return _implementation(model).startswith(NAME)


def _set(model: Any, name: str) -> None:
    model.set_attn_implementation(name)
    if _implementation(model) != name:  # transformers only warns
        raise _not_chosen(type(model), model.config)


def _not_chosen(kind: type, config: Any) -> Unsupported:
    if (why := NOT_FOLDED.get(config.model_type)) is not None:
        return Unsupported(f"{config.model_type} {why}", "Use it without a folded cache")
    return Unsupported(
        f"{kind.__name__} does not let its attention implementation be chosen", "Use the stock cache for it"
    )


def is_expanded(config: Any) -> bool:
    """Whether models of this config attend by themselves."""
    return variant_of(config.get_text_config(decoder=True).to_dict(), slides=False).expanded


def check_family(config: Any) -> None:
    """Raise what `attach` would raise for a model of this config, where transformers knows its class."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if is_expanded(config):
        return
    if kind is not None and not kind._can_set_attn_implementation():
        raise _not_chosen(kind, config)


class Attached:
    """What `attach` returns: use it in `with` to put back, at the end, what the model had before; or ignore it."""

    def __init__(self, model: Any, before: str) -> None:
        self.model, self._before = model, before

    def __enter__(self) -> Any:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set(self.model, self._before)


def attach(model: Any) -> Attached:
    """Let a transformers model's attention read folded caches. Stock caches still work; `detach` undoes it. Models that attend by
    themselves are left as they are: their caches hand them keys and values.

    Raises InvalidConfig for what is not a transformers model and Unsupported if its attention cannot be replaced.
    """
    before = _implementation(model)
    if is_expanded(model.config):
        return Attached(model, before)
    _keep_latents(model)
    if not before.startswith(NAME):
        _set(model, register(before))
    return Attached(model, before)


def detach(model: Any) -> None:
    """Give the model back the attention implementation it had before `attach`; `sdpa` if it was loaded with `kvfold`."""
    name = _implementation(model)
    if name.startswith(NAME):
        _set(model, name.removeprefix(NAME).removeprefix("_") or "sdpa")
