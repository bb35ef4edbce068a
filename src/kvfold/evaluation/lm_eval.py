"""A model of lm-evaluation-harness that answers through a folded cache: LongBench, RULER, GSM8K and the rest, by its own tasks.

`python -m kvfold.evaluation.lm_eval run --model kvfold --model_args pretrained=demo,profile=balanced --tasks …` is the harness's
own command line with the model `kvfold` in it; in Python, importing this file registers it. `profile=lossless` is the 16-bit
cache to compare with.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.hf_transformers import FoldedCache, attach
from kvfold.errors import InvalidConfig, MissingExtra
from kvfold.evaluation.divergence import CALL_TOKENS
from kvfold.loading import Options, load
from kvfold.profiles import load as load_profile

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtra.of("kvfold.evaluation.lm_eval", "lm-eval", "lm-eval") from error


@register_model("kvfold")
class FoldedLM(HFLM):
    """HFLM whose every request reads its context through a FoldedCache.

    pretrained: folder, hub id, GGUF file or `demo`. profile: a name or a TOML file. call_tokens: how the context is cut; tokens
    of one call see each other exactly, so that one long call would leave hardly anything to the pages. Options of
    kvfold.loading (revision, dtype, device, …) and of HFLM (batch_size, max_length, …) by their names.
    """

    def __init__(
        self, pretrained: str = "demo", profile: str = "balanced", call_tokens: int = CALL_TOKENS, **options: Any
    ) -> None:
        if call_tokens < 1:
            raise InvalidConfig("call_tokens is less than one", "Use 64, or as many as your prompts are read in")
        self.profile = load_profile(profile)
        self.call_tokens = call_tokens
        mine = {f.name: options.pop(f.name) for f in fields(Options) if f.name in options}
        # The harness's command line says cuda:0 unless told otherwise, and its own models then fall back to the CPU.
        if str(mine.get("device")).startswith("cuda") and not torch.cuda.is_available():
            mine["device"] = None
        loaded = load(pretrained, Options(**mine))
        super().__init__(loaded.model, tokenizer=loaded.tokenizer, **options)
        self.pretrained = loaded.source
        attach(self.model)

    def _cache(self) -> FoldedCache:
        return FoldedCache(self.model.config, spec=self.profile.spec)

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of ids [B, T]; padding is on the right, where nothing reads it."""
        cache = self._cache()
        parts = inps.split(self.call_tokens, dim=1)
        return torch.cat([self.model(part, past_key_values=cache).logits for part in parts], dim=1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        return super()._model_generate(
            context,
            max_length,
            stop,
            past_key_values=self._cache(),
            prefill_chunk_size=self.call_tokens,
            **generation_kwargs,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What a result file says of the model: HFLM's facts, and how its cache was folded."""
        folded = {"profile": self.profile.name, "spec": asdict(self.profile.spec), "call_tokens": self.call_tokens}
        return {**super().get_model_info(), "kvfold": folded}


def main() -> None:
    """The command line of lm-evaluation-harness, with the model `kvfold`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
