"""Models that cannot be loaded: what libraries raise for them, and what is to be said instead."""

from __future__ import annotations

import difflib
import struct
import traceback
from pathlib import Path

from kvfold.errors import ModelError, ModelNotFound, NeedsRemoteCode, UnsupportedModel


def explained(source: str, error: Exception, offline: bool) -> ModelError:
    """The error to raise for one that came of loading `source`, with what to do about it."""
    text = str(error)
    low = text.lower()
    if "trust_remote_code" in low:
        return NeedsRemoteCode(
            f"{source} needs code from its own repository", "Read that code, then pass --trust-remote-code"
        )
    if "gated" in low or "401" in low or "403" in low:
        return ModelNotFound(f"{source} is gated or private", "Accept its licence on the hub and run: hf auth login")
    if "does not recognize this architecture" in low or "model type" in low:
        return UnsupportedModel(f"transformers does not know the architecture of {source}", "Upgrade transformers")
    if "gguf" in low and isinstance(error, ImportError):
        return ModelError(f"reading {source} needs the package 'gguf'", "Install it with: pip install 'kvfold[gguf]'")
    if isinstance(error, ImportError):  # of a library that quantized its weights
        return ModelError(
            f"{source} needs a package that is not installed: {first_line(error)}",
            "Install it; torchao and bitsandbytes come with: pip install 'kvfold[quantized]'",
        )
    if isinstance(error, OSError):
        if Path(source).exists():
            return ModelError(f"{source} could not be read: {first_line(error)}", "Check that the folder is complete")
        where = "is not in the local cache" + ("" if offline else ", and the hub did not have it or cannot be reached")
        return ModelNotFound(
            f"{source} {where}{_cached_names(source)}", "Check the spelling, or give a model folder or 'demo'"
        )
    if "ignore_mismatched_sizes" in low:
        return ModelError(
            f"the weights of {source} have other shapes than its config.json says", "Take both from one model"
        )
    if "backend tokenizer" in low or "tokenizer" in _raised_in(error):
        return ModelError(
            f"the tokenizer of {source} could not be loaded: {first_line(error)}",
            "Put the model's tokenizer.json and tokenizer_config.json beside its weights",
        )
    return ModelError(f"{source} could not be loaded: {first_line(error)}", "Check that its files are whole")


def raised() -> tuple[type[Exception], ...]:
    """What transformers, and the libraries under it, raise for configs, weights and tokenizers that are broken."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    usual = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError)
    return (*usual, struct.error, StrictDataclassError, SafetensorError)


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line; the reason of a config's field that it does not take."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [type(error).__name__]
    return (lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]).rstrip(".")


def _raised_in(error: Exception) -> str:
    """File of the innermost frame that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).name if frames else ""


def _cached_names(source: str) -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = (
        [p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*")] if cache.is_dir() else []
    )
    close = difflib.get_close_matches(source, [*there, "demo"], n=3)
    return f" (there is: {', '.join(close)})" if close else ""
