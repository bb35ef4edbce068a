"""transformers: encoder-decoders, models that see, and what unusual softmaxes and widths go through besides plain calls."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families
from tests.families import LENGTH, ROUNDING, STEPS, logits_of, make, padded, prompt
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import kvfold
from kvfold.errors import KvfoldError, Unsupported
from kvfold.sessions.archive import info
from kvfold.sessions.session import Session

VOCABULARY = 61
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
IMAGE_TOKENS = slice(21, 25)


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max()) < ROUNDING * float(want.std())


@torch.no_grad()
def test_encoder_decoders_fold_what_the_decoder_reads_of_itself() -> None:
    """Cross-attention has a cache of its own, which stays exact; a FoldedCache in its place is refused."""
    torch.manual_seed(0)
    sizes = {f"{side}_{n}": x for side in ("encoder", "decoder") for n, x in (("layers", 2), ("attention_heads", 2))}
    config = BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=400, pad_token_id=0, **sizes)
    model = BartForConditionalGeneration(config).eval()
    source, target = prompt(1, 40), prompt(1, LENGTH, seed=1)
    want = model(input_ids=source, decoder_input_ids=target).logits
    with kvfold.attach(model):
        folded = kvfold.FoldedCache(config, "lossless")
        cache = EncoderDecoderCache(folded, DynamicCache())
        parts = [
            model(input_ids=source, decoder_input_ids=x, past_key_values=cache).logits for x in target.split(150, 1)
        ]
        assert close(torch.cat(parts, 1), want)
        assert all(s.folded for x in folded.folded_layers for s in x.folded.sequences)
        with pytest.raises(KvfoldError):
            model(input_ids=source, decoder_input_ids=target, past_key_values=kvfold.FoldedCache(config, "lossless"))


ENCODERS: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "num_heads", "encoder_expert_capacity"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "d_ff"), 48),
    "d_kv": 8,
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "mt5", "umt5", "longt5", "m2m_100", "nllb-moe", "led", "fsmt", "pegasus_x"])
def test_decoders_with_a_bias_or_attention_of_their_own(family: str) -> None:
    known = CONFIG_MAPPING[family]()
    sizes = {k: x for k, x in (families.SIZES | ENCODERS).items() if families.settable(known, k)}
    sizes |= {"decoder_start_token_id": 1, "eos_token_id": 2}
    sizes.pop("num_hidden_layers", None)
    torch.manual_seed(0)
    model = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(known)](type(known)(**sizes)).eval()
    source, target = prompt(1, 40), prompt(1, LENGTH, seed=1)

    def logits(own: Any) -> Tensor:
        cache = EncoderDecoderCache(own, DynamicCache())
        parts = [
            model(input_ids=source, decoder_input_ids=x, past_key_values=cache).logits for x in target.split(150, 1)
        ]
        return torch.cat(parts, 1)

    want = logits(DynamicCache(config=model.config))
    with kvfold.attach(model):
        folded = kvfold.FoldedCache(model.config, "lossless")
        assert close(logits(folded), want)
    assert all(s.folded for x in folded.folded_layers for s in x.folded.sequences)


@torch.no_grad()
def test_positions_in_three_axes() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=60,
        video_token_id=59,
        vision_start_token_id=58,
        vision_end_token_id=57,
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    ids = prompt(1, LENGTH) % 50 + 3
    ids[:, IMAGE_TOKENS.start - 1], ids[:, IMAGE_TOKENS], ids[:, IMAGE_TOKENS.stop] = 58, 60, 57
    image = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    kinds = (ids == 60).int()

    def logits(cache: Any) -> Tensor:
        first = model(ids[:, :150], mm_token_type_ids=kinds[:, :150], past_key_values=cache, **image).logits
        return torch.cat([first, model(ids[:, 150:], past_key_values=cache).logits], 1)

    want = logits(DynamicCache(config=config))
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(config, "lossless")
        assert close(logits(cache), want)
    assert len(cache.folded_layers) == len(cache.layers)


@torch.no_grad()
def test_images_that_see_themselves_in_both_directions_are_refused() -> None:
    torch.manual_seed(0)
    text = {**TEXT, "head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = prompt(1, LENGTH) % 50 + 3
    ids[:, IMAGE_TOKENS] = 60
    with kvfold.attach(model), pytest.raises(Unsupported, match="not plain causal"):
        model(
            input_ids=ids,
            token_type_ids=(ids == 60).int(),
            pixel_values=torch.randn(1, 3, 28, 28),
            past_key_values=kvfold.FoldedCache(config, "lossless"),
        )


UNUSUAL = ("gemma2", "gpt_oss", "mimo_v2_flash")


@pytest.mark.parametrize("family", UNUSUAL)
def test_beams(family: str) -> None:
    model = make(family)
    ids, mask = padded()
    options = {"attention_mask": mask[:, :LENGTH], "max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    want = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    with kvfold.attach(model):
        got = model.generate(ids, past_key_values=kvfold.FoldedCache(model.config, "lossless"), **options)
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("family", UNUSUAL)
def test_forks_trims_copies_and_watchers(family: str) -> None:
    model = make(family)
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, "turbo-3")
        cache.watch(every=1)
        for part in prompt(1, 400).split(100, 1):
            model(part, past_key_values=cache)
        others = [cache.fork(), pickle.loads(pickle.dumps(cache))]
        want = model(prompt(1, 3, seed=2), past_key_values=cache).logits
        for other in others:
            assert torch.equal(model(prompt(1, 3, seed=2), past_key_values=other).logits, want)
        for row in cache.report()["layers"]:
            if row["kind"] == "folded":
                assert 0 < row["fidelity"]["output_error"] < 0.5
                assert 0 < row["fidelity"]["folded_mass"] < 1


@pytest.mark.parametrize("family", ["mimo_v2_flash", "deepseek_v3"])
def test_sessions_of_unequal_widths(family: str, tmp_path: Path) -> None:
    """Values narrower than keys, and latents beside their rotary parts, go to files and come back."""
    model = make(family)
    session = Session.new(model, profile="lossless")
    session.extend(prompt(1, 300)[0].tolist())
    session.save(tmp_path / "kept")
    again = Session.load(tmp_path / "kept", model)
    assert torch.equal(again.extend([7]), session.extend([7]))
    assert info(tmp_path / "kept")["bits_per_value"] == 32  # of a float32 model
    kvfold.detach(model)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
SEEING = (
    "aya_vision",
    "gemma3",
    "idefics3",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "llava",
    "mistral3",
    "qwen3_5",
    "qwen3_vl",
)


def seeing(family: str) -> Any:
    """A tiny model of a family that sees, its text part as tests/families.py has it."""
    default = CONFIG_MAPPING[family]()
    text, vision = default.get_text_config(decoder=True), default.vision_config
    sizes = families.sizes_of(type(text)(), text.model_type)
    if "layer_types" not in sizes and len(set(getattr(text, "layer_types", None) or ())) > 1:
        sizes["layer_types"] = [text.layer_types[0], "full_attention"] * 2
    rope = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        sizes["rope_parameters"] = {
            **rope,
            "mrope_section": [2, 3, 3] if rope.get("partial_rotary_factor", 1) == 1 else [1, 1, 0],
        }
    own = {k: v for k, v in VISION.items() if hasattr(vision, k)}
    made = {
        "text_config": {**sizes, "model_type": text.model_type},
        "vision_config": {**own, "model_type": vision.model_type},
    }
    ids = {
        k: 60
        for k in ("image_token_id", "video_token_id", "image_token_index")
        if getattr(default, k, None) is not None
    }
    config = CONFIG_MAPPING[family](**made, **ids)
    torch.manual_seed(0)
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in SEEING if f in CONFIG_MAPPING])
def test_models_that_see_are_equal_on_text(family: str) -> None:
    model = seeing(family)
    want = logits_of(model, DynamicCache(config=model.config))
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, "lossless")
        assert close(logits_of(model, cache), want)
    assert cache.folded_layers or family == "mistral3"  # whose layers all slide


@torch.no_grad()
@pytest.mark.parametrize(("family", "named"), [("paligemma", "not causal"), ("mllama", "cross-attention")])
def test_models_that_mix_what_they_see_into_the_cache_are_refused(family: str, named: str) -> None:
    config = CONFIG_MAPPING[family]()
    if family == "mllama":
        with pytest.raises(Unsupported, match=named):
            kvfold.FoldedCache(config)
        return
    model = seeing(family)
    with kvfold.attach(model), pytest.raises(Unsupported, match=named):
        logits_of(model, kvfold.FoldedCache(model.config))
