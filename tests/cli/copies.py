"""Quantized copies of the shipped model: saved by the libraries that people's checkpoints come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from kvfold.loading import demo_folder

GROUP = 64  # values that share a scale in 4-bit codes


def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.bfloat16)


def _torchao(name: str, **how: Any) -> TorchAoConfig:
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)(**how))


def _int4() -> TorchAoConfig:
    from torchao.quantization import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(GROUP))


CONFIGS: dict[str, Any] = {
    "torchao int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao int8, activations too": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": _int4,
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}
# Bytes of a linear layer's weight of `rows` outputs and `values` numbers: codes, scales, and what decodes them.
BLOCK, SCALES = 64, 256  # nf4: values per scale, scales per scale of theirs
LINEAR_BYTES: dict[str, Any] = {
    "torchao int8": lambda rows, values: values + (4 + 1) * rows,  # a float32 scale and a zero point
    "torchao int8, activations too": lambda rows, values: values + (4 + 1) * rows,
    "torchao int4": lambda rows, values: values + (2 + 1) * values // GROUP,  # a byte per code, scale and zero point
    "bitsandbytes int8": lambda rows, values: values + 4 * rows,
    "bitsandbytes nf4": lambda rows, values: (
        values // 2 + values // BLOCK + 4 * -(-values // BLOCK // SCALES) + 4 * (16 + 256) + 4
    ),
}


# Formats of compressed-tensors, which vLLM's compressor writes: packed codes, codes of a byte, float8.
COMPRESSED: dict[str, dict[str, Any]] = {
    "compressed-tensors int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
    "compressed-tensors int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "compressed-tensors fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
}
LARGEST = {"int4": 7.5, "int8": 127.5, "fp8": 448.0}  # code, half a step beyond it included


def _save_compressed(kind: str, folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = plain()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **COMPRESSED[kind]))
    frozen = QuantizationStatus.FROZEN
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status=frozen)
    apply_quantization_config(model, config)
    for x in model.modules():
        if hasattr(x, "weight_scale"):
            largest = x.weight.data.float().unflatten(1, (x.weight_scale.shape[1], -1)).abs().amax(-1)
            x.weight_scale.data.copy_(largest / LARGEST[kind.split()[-1]])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def save(kind: str, folder: Path) -> Path:
    """The shipped model with weights of this kind, as transformers saves it."""
    where = demo_folder()
    if kind in COMPRESSED:
        _save_compressed(kind, folder)
        AutoTokenizer.from_pretrained(where).save_pretrained(folder)
        return folder
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, quantization_config=CONFIGS[kind]())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where).save_pretrained(folder)
    return folder


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def save_gguf(kind: str, file: Path) -> Path:
    """The shipped model as llama.cpp would convert it. kind: of its matrices, such as Q8_0."""
    model, tokenizer = plain(), AutoTokenizer.from_pretrained(demo_folder())
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    for name, x in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            _add_tensor(writer, name, x.float(), config, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    model = tokenizer.backend_tokenizer
    vocabulary = sorted(model.get_vocab().items(), key=lambda x: x[1])
    special = set(tokenizer.all_special_ids)
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for _, i in vocabulary]
    merges = json.loads(model.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([t for t, _ in vocabulary])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)


def _add_tensor(writer: Any, name: str, x: torch.Tensor, config: Any, kind: Any) -> None:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name not in outer:
        _, _, layer, *inner, end = name.split(".")
        part = ".".join(inner)
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if part in heads:  # llama.cpp turns neighbouring coordinates, transformers those half a head apart
            x = x.reshape(heads[part], 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        outer[name] = f"blk.{layer}.{GGUF_NAMES[part]}.{end}"
    if x.dim() == 1:
        writer.add_tensor(outer[name], x.numpy())
        return
    writer.add_tensor(outer[name], quantize(x.numpy(), kind), raw_dtype=kind)
