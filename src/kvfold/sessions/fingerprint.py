"""Which model a session belongs to: its config, and digests of tensors, adapters and tokenizer, by name."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from kvfold.errors import Unsupported, WrongModel
from kvfold.sessions.files import bytes_of, digest

SAMPLE_BYTES = 1 << 16  # of every tensor, in SAMPLES pieces spread over it
SAMPLES = 16
SMALL_BYTES = 1 << 28  # models of up to so many bytes are digested whole at once: .1 s
# Config entries that say how a model is run or who wrote the file, not what it computes.
VOLATILE = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
# Encoded as a test of the tokenizer: cases, digits, spaces, accents, other scripts, code.
PROBE = "The quick brown fox's 1234.50 km\n\tif (x != y) { return naïve + 'ÅΩ漢字🙂'; }  end"

Fingerprint = dict[str, Any]


def fingerprint(model: Any, tokenizer: Any = None) -> Fingerprint:
    """config, tensors (names, shapes, dtypes), weights (64 KiB of every tensor), adapters; tokenizer, if there is one; and
    full, every byte of a small model.

    Of tensors as loaded, so it also knows models that are not files: GGUF, merged adapters, weights made in place.
    Raises Unsupported for weights that are not in memory.
    """
    tensors = _tensors(model)
    shapes = [[name, list(x.shape), str(x.dtype)] for name, x in tensors]
    out = {
        "config": lasting(json.loads(model.config.to_json_string(use_diff=False))),
        "tensors": _json(shapes),
        "weights": digest(*(piece for _, x in tensors for piece in _samples(x))),
        "adapters": _json(_adapters(model)),
    }
    if tokenizer is not None:
        probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        out["tokenizer"] = _json([sorted(tokenizer.get_vocab().items()), probe])
    if sum(x.nbytes for _, x in tensors) <= SMALL_BYTES:
        out |= full(model)
    return out


def full(model: Any) -> Fingerprint:
    """Digest of every byte of every tensor, in the order of names."""
    return {"full": digest(*(bytes_of(x) for _, x in _tensors(model)))}


def check(made_with: Fingerprint, now: Fingerprint) -> None:
    """Raise WrongModel with what differs. What only one side knows is not compared: a tokenizer, or entries of configs,
    which come and go with versions of transformers."""
    wrong = [name for name in made_with if name in now and _differ(made_with[name], now[name])]
    if wrong:
        raise WrongModel(
            f"the session was made with another model: {', '.join(wrong)} differ",
            "Load the model, dtype, adapters and tokenizer it was made with, or prefill its tokens again",
        )


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return any(_differ(a[k], b[k]) for k in a.keys() & b.keys())
    return bool(a != b)


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    named = sorted((n, x) for n, x in model.state_dict().items() if isinstance(x, Tensor))
    missing = [name for name, x in named if x.is_meta]
    if missing:
        raise Unsupported(
            f"{missing[0]} is not in memory (offloaded by accelerate)",
            "Load the model without offloading to keep sessions",
        )
    return named


def _samples(x: Tensor) -> list[memoryview]:
    """SAMPLES pieces of a tensor, evenly spread from its start to its end; all of a small one."""
    flat = x.detach().reshape(-1)
    piece = SAMPLE_BYTES // SAMPLES // x.element_size()
    if len(flat) <= piece * SAMPLES:
        return [bytes_of(flat)]
    starts = [i * (len(flat) - piece) // (SAMPLES - 1) for i in range(SAMPLES)]
    return [bytes_of(flat[a : a + piece]) for a in starts]


def lasting(x: Any) -> Any:
    """A config without the entries that do not change results."""
    if isinstance(x, dict):
        return {k: lasting(v) for k, v in x.items() if k not in VOLATILE}
    return x


def _adapters(model: Any) -> list[Any]:
    """Settings of PEFT adapters, whose scale is not in their tensors, and which of them are on."""
    settings = getattr(model, "peft_config", None)
    if not settings:
        return []
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    return [sorted(active), {name: c.to_dict() for name, c in settings.items()}]


def _json(data: Any) -> str:
    return digest(json.dumps(data, sort_keys=True, default=str).encode())
