"""The verb that writes text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import common
from kvfold.errors import InvalidConfig
from kvfold.loading import Options, load
from kvfold.profiles import load as load_profile

PREFILL_TOKENS = 2048


def generate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt; default: standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the prompt.")] = None,
    profile: common.ProfileName = "balanced",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Model dtype; quantized weights keep theirs.")] = "auto",
    revision: common.Revision = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    trust_remote_code: common.Trust = False,
    chat_template: common.Template = None,
    offline: common.Offline = False,
    json: common.Json = False,
) -> None:
    """Continue a prompt through a folded cache; text streams to stdout."""
    spec = load_profile(profile).spec
    text = _prompt(prompt, prompt_file)
    loaded = load(model, Options(revision, dtype, device, device_map, trust_remote_code, chat_template, offline))
    import torch
    from transformers import TextStreamer

    from kvfold.adapters.hf_graph import cuda_graphs
    from kvfold.adapters.hf_transformers import FoldedCache, attach

    torch.manual_seed(seed)
    inputs = loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(loaded.model.device)
    if inputs.input_ids.shape[1] == 0:
        raise InvalidConfig("the prompt is empty", "Give --prompt, --prompt-file, or text on standard input")
    cache = FoldedCache(loaded.model.config, spec=spec)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    streamer = None if json else TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    began = time.perf_counter()
    with attach(loaded.model), cuda_graphs(loaded.model):
        out = loaded.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            prefill_chunk_size=PREFILL_TOKENS,
            streamer=streamer,
            **sampling,
        )
    seconds = time.perf_counter() - began
    new = out[0, inputs.input_ids.shape[1] :]
    if json:
        report = cache.report(loaded.model)
        common.show_json(
            {
                "text": loaded.tokenizer.decode(new, skip_special_tokens=True),
                "tokens": new.tolist(),
                "prompt_tokens": int(inputs.input_ids.shape[1]),
                "seconds": seconds,
                "profile": profile,
                **{k: report[k] for k in ("cache_bytes", "reference_bytes", "ratio", "state_bytes", "weights_bytes")},
            }
        )
        return
    sys.stderr.write(f"[{len(new)} tokens in {seconds:.1f} s; cache {cache.nbytes / 2**20:.1f} MiB]\n")


def _prompt(prompt: str | None, path: Path | None) -> str:
    if prompt is not None and path is not None:
        raise InvalidConfig("--prompt and --prompt-file are both given", "Give one of them")
    if prompt is not None:
        return prompt
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(
                f"{path} cannot be read as UTF-8 text", "Give --prompt-file a UTF-8 text file"
            ) from error
    return sys.stdin.read()


def add_to(app: typer.Typer) -> None:
    app.command()(generate)
