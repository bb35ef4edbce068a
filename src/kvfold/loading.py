"""One way to get a model and its tokenizer: a folder, a hub id, a GGUF file, or `demo`, the model in this package.

Local files come first; the network is asked only for a hub id that is not in the local cache, and never when offline.
"""

from __future__ import annotations

import difflib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from kvfold.broken import explained, first_line, raised
from kvfold.errors import (
    InvalidConfig,
    KvfoldError,
    MissingExtra,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
)
from kvfold.planner import gguf
from kvfold.planner.architecture import check_sizes, read
from kvfold.planner.model import Model
from kvfold.planner.weights import Weights, of_folder, of_gguf

DEMO = "recall-llama-12m"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# The shipped models have no chat format of their own: contents are joined as they are.
VERBATIM_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Options:
    """How to load; the fields are the command line's options of the same names. Quantized checkpoints keep their own dtype."""

    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    offline: bool = False


@dataclass(frozen=True)
class Loaded:
    """model: a transformers model in eval mode; tokenizer: its tokenizer; source: what was asked for."""

    model: Any
    tokenizer: Any
    source: str


def demo_folder() -> Path:
    """Where the shipped model lies."""
    return Path(str(resources.files("kvfold.models"))) / DEMO


@contextmanager
def _quiet_and_offline(offline: bool) -> Iterator[None]:
    """No telemetry, no progress bars on stdout; no network when offline."""
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if offline:
        wanted["HF_HUB_OFFLINE"] = "1"
    before = {k: os.environ.get(k) for k in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for k, v in before.items():
            if v is None:
                os.environ.pop(k, None)
            else:
                os.environ[k] = v


def _near(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path()
    close = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3)
    return f" (there is: {', '.join(close)})" if close else ""


def _resolve(source: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, extra arguments of from_pretrained)."""
    if source == "demo":
        return str(demo_folder()), {}
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"no file {source}{_near(path)}", "Give the path of a GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"the folder {source} holds no config.json", "Give the folder a model was saved in")
        return str(path), {}
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or path.exists()
    if looks_like_path:
        raise ModelNotFound(f"no folder {source}{_near(path)}", "Give a model folder, a hub id, a GGUF file, or 'demo'")
    return source, {}


def load_config(source: str, options: Options | None = None) -> Any:
    """The config alone, without weights; a config.json may be named itself. Raises ModelError subclasses with the cure."""
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        from transformers import CONFIG_MAPPING

        content = _config_of(path)
        if (kind := content.get("model_type")) not in CONFIG_MAPPING:
            raise UnsupportedModel(f"transformers does not know the model_type {kind!r} of {source}", "Upgrade it")
        return _known(content, source)
    return _load(source, options or Options(), weights=False).model


@dataclass(frozen=True)
class Described:
    """model: what the planner reads; weights: of the files at hand, or counted from the config; None if unknown."""

    model: Model
    weights: Weights | None
    source: str


def describe(source: str, options: Options | None = None) -> Described:
    """A model's shape and weights without loading it: a folder, a config.json, a GGUF file, a hub id or `demo`.

    Needs neither torch nor transformers for files at hand; with transformers, configs it knows are completed by it.
    """
    options = options or Options()
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        return _described(_config_of(path), None, source)
    where, extra = _resolve(source)
    if "gguf_file" in extra:
        metadata, weights = of_gguf(Path(where) / extra["gguf_file"])
        return Described(read(gguf.as_config(metadata)), weights, source)
    folder = Path(where) if Path(where).is_dir() else _cached_folder(where, options)
    return _described(_config_of(folder / "config.json"), of_folder(folder), source)


def _config_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not JSON ({error})", "Give the config.json of a model") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str | None):
        raise ModelError(f"{path} describes no model", "Give the config.json of a model")
    check_sizes(content)
    return content


def _special_float(pairs: dict[str, Any]) -> Any:
    """transformers writes infinities as objects, which JSON has no numbers for."""
    return float(pairs["__float__"]) if set(pairs) == {"__float__"} else pairs


def _known(content: dict[str, Any], source: str) -> Any:
    """The config that transformers makes of a config.json's content. Raises UnsupportedModel if it refuses."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        config.get_text_config(decoder=True).to_dict()
        return config
    except raised() as error:
        raise UnsupportedModel(
            f"transformers does not take the config of {source}: {first_line(error)}",
            "Compare it with the config.json that was published with the model",
        ) from error


def _described(config: dict[str, Any], weights: Weights | None, source: str) -> Described:
    """With transformers, a known model_type gets the keys its config class derives and, without files, its parameters."""
    try:
        from transformers import CONFIG_MAPPING
    except ModuleNotFoundError:
        return Described(read(config), weights, source)
    if config.get("model_type") not in CONFIG_MAPPING:
        return Described(read(config), weights, source)
    known = _known(config, source)
    check_decodes(known, source)
    return Described(read(complete(known)), weights or _counted(known), source)


def complete(config: Any) -> dict[str, Any]:
    """A transformers config as the content of a config.json, derived keys included."""
    text = config.get_text_config(decoder=True)
    keys = {"layer_types": getattr(text, "layer_types", None), "dtype": text.dtype or config.dtype}
    # Names that a class only maps to older ones of its own; where layers differ in one, it has no value of its own to ask for.
    mapped = {}
    for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        with suppress(AttributeError, RuntimeError):
            mapped[name] = getattr(text, name)
    return {**mapped, **text.to_dict(), **{k: v for k, v in keys.items() if v is not None}}


def _generating() -> tuple[Any, ...]:
    """The mappings of configs to models that write text."""
    from transformers.models.auto import modeling_auto as auto

    return (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )


def check_decodes(config: Any, source: str = "this") -> None:
    """Raise UnsupportedModel for a transformers config of a model that writes no text, such as an encoder."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    text = config.get_text_config(decoder=True)
    writes = any(type(x) in mapping for x in (config, text) for mapping in _generating())
    fills_in = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if not writes or (fills_in and not getattr(config, "is_decoder", False)):
        raise UnsupportedModel(
            f"{source} is a {config.model_type}, which writes no text as it is", "Give a language model that decodes"
        )


def _counted(config: Any) -> Weights | None:
    """Weights that a config alone describes, at the config's dtype; None for classes that cannot be made without files."""
    import torch

    for mapping in _generating():
        if type(config) in mapping:
            try:
                with torch.device("meta"):
                    model = mapping[type(config)](config)
            except raised():  # its towers may need packages that are not here
                return None
            parameters = sum(p.numel() for p in model.parameters())
            return Weights(parameters * (config.dtype or torch.bfloat16).itemsize, parameters)
    return None


def _cached_folder(source: str, options: Options) -> Path:
    """The folder of a hub id in the local cache; the hub is asked for the config alone if it is not there."""
    folder = _snapshot(source, options.revision or "main")
    if folder is None:
        load_config(source, options)
        folder = _snapshot(source, options.revision or "main")
    if folder is None:
        raise ModelNotFound(f"{source} is not in the local cache", "Give a folder, a config.json, or 'demo'")
    return folder


def _snapshot(source: str, revision: str) -> Path | None:
    """Where the hub's cache keeps a revision, if its config is there. Works without the hub's client."""
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    repo = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))) / f"models--{source.replace('/', '--')}"
    ref = repo / "refs" / revision
    folder = repo / "snapshots" / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
    return folder if (folder / "config.json").is_file() else None


def load(source: str, options: Options | None = None) -> Loaded:
    """Model and tokenizer. Raises MissingExtra, ModelNotFound, NeedsRemoteCode, UnsupportedModel, ModelError."""
    return _load(source, options or Options(), weights=True)


def _load(source: str, options: Options, weights: bool) -> Loaded:
    try:
        import torch
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MissingExtra.of("loading a model", str(error.name), "transformers") from error
    transformers.utils.logging.disable_progress_bar()
    if weights:
        _check(options, torch)
    where, extra = _resolve(source)
    common: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code, **extra}
    if (local := Path(where).is_dir()) and "gguf_file" not in extra:
        _config_of(Path(where) / "config.json")  # sizes that cannot be would take all memory before anything complains

    def attempt(local_only: bool) -> Loaded:
        found = {**common, "local_files_only": local_only}
        if not weights:
            config = AutoConfig.from_pretrained(where, **found)
            config.get_text_config(decoder=True).to_dict()  # which may be no config
            return Loaded(config, None, source)
        quantized = getattr(AutoConfig.from_pretrained(where, **found), "quantization_config", None) is not None
        own = replace(options, dtype="auto") if quantized else options  # codes decode to the dtype they were made from
        return _with_weights(where, found, own, source, AutoModelForCausalLM, AutoTokenizer, torch)

    with _quiet_and_offline(options.offline):
        try:
            try:
                return attempt(local_only=True)
            except OSError:
                if local or options.offline or not _hub_answers():
                    raise
                return attempt(local_only=False)
        except KvfoldError:
            raise
        except raised() as error:
            raise explained(source, error, options.offline) from error


def check_device(name: str) -> None:
    """Raise InvalidConfig if torch has no such device here."""
    import torch

    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InvalidConfig(
            f"device {name!r} cannot be used here: {first_line(error)}", "Leave it out for the CPU"
        ) from error


def _check(options: Options, torch: Any) -> None:
    """Raise for a dtype, a device or a template that cannot be, before anything is read."""
    if options.dtype not in DTYPES:
        raise UnsupportedModel(f"unknown dtype {options.dtype!r}", f"Use one of: {', '.join(DTYPES)}")
    if options.device is not None:
        check_device(options.device)
    if options.chat_template and not Path(options.chat_template).is_file():
        raise InvalidConfig(f"there is no chat template {options.chat_template}", "Give the path of a text file")


def _hub_answers() -> bool:
    """Whether the hub's host resolves. Without this, a machine off the network waits through a minute of retries."""
    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return not constants.HF_HUB_OFFLINE


def _with_weights(
    where: str,
    common: dict[str, Any],
    options: Options,
    source: str,
    model_class: Any,
    tokenizer_class: Any,
    torch: Any,
) -> Loaded:
    tokenizer = tokenizer_class.from_pretrained(where, **common)
    if options.chat_template:
        tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
    elif source == "demo" and not tokenizer.chat_template:
        tokenizer.chat_template = VERBATIM_TEMPLATE
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = model_class.from_pretrained(where, dtype=dtype, device_map=options.device_map, **common).eval()
    if options.device:
        model = model.to(options.device)
    return Loaded(model, tokenizer, source)
