"""Write docs/families.md: every family of tests/families.py, run against the stock cache and described by `kvfold doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, DynamicCache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.families import FAMILIES, ROUNDING, config, logits_of, make  # noqa: E402

import kvfold  # noqa: E402
from kvfold.diagnosis import layers_of  # noqa: E402
from kvfold.errors import KvfoldError  # noqa: E402
from kvfold.planner.plan import SLIDING  # noqa: E402

DOC = ROOT / "docs" / "families.md"
HEAD = """# Families

What a `FoldedCache` does with models of transformers. Written by `scripts/families.py`, which runs each family as
`tests/adapters/test_families.py` does: a tiny model with random weights, a left-padded batch, prefilled in two calls and
continued by single tokens. **equal** means that a cache of the profile `lossless` gives the logits of the stock cache, up
to float32 rounding; folded profiles run the same path. What is refused, with the message in the last column, is refused before a token is
stored: types that transformers runs without a cache of keys and values, or with one of their own that takes no other's place. `tests/adapters/test_family_modes.py` takes every family that is equal through beams, two turns of one
cache, and sessions: forked, gone back, saved and loaded, decoded together.

Layers are of the family's default config: *folded* ones; *windows*, sliding or chunked layers that fold, because they take less folded
than the exact tokens that they read (CPU; on a GPU, which has no kernels for them, they stay exact); *exact* ones, whose window takes less
as it is;
*state*, recurrent or convolutional; a layer with attention and a state beside it counts in both. The engine is the one `kvfold doctor` names for profile `balanced` on a CPU; where it is
`torch`, head size or softmax (softcap, sink logits) has no native kernel, or keys and values differ in size.

Models that attend by themselves, because transformers gives them no choice of attention (Bloom, Falcon, GPT-J, MPT), or that change keys after
caching them (DiffLlama, Doge, JetMoe), or add a bias by position (Inkling, T5), or choose what queries read by an indexer (DeepSeek V3.2,
GLM-5), are handed decoded keys and values, layer by layer and for as long as the layer takes: memory between calls is that of any
folded cache, a step costs the decoding of all pages. Padding is stored there like tokens. The engine named is the one that decodes. Keys
of indexers stay as they are, since an error in them would be another choice; they are counted in the cache and in what it is compared with.

Multi-head latent attention (DeepSeek, Kimi, GLM-4.7-Flash and others): the latent, which is key and value at once, is folded as keys of
the profile are; the rotary part of the key stays as it is. Attention is absorbed: queries go to the latents' space, nothing is
expanded but a block of latents at a time. It runs on the `torch` engine only. `kv_b_proj` has to be unquantized. What folding
costs was measured on a small model that `scripts/train_mla.py` trains in minutes (2.7 M parameters, latents of 128 numbers; held-out text, perplexity
5.04): KLD 0.000033 ± 0.000002 and 99.8 % equal top tokens with `balanced`, 0.000055 ± 0.000004 and 99.7 % with `compact` (rows `mla-tiny` of
`bench/results/eval.csv`). Larger trained models of this kind were not measured.

Windows that fold keep no sinks: queries pass them. Pages that no query reads any more are given up, three pages later than they could be, so
that trims inside the exact part stay possible. Decode steps run in the CPU kernels, longer calls by way of torch. `tests/adapters/
test_windows.py` holds them, forced into lossless pages, to the stock cache.

Keys that later layers share (Gemma 3n, Gemma 4) are read by each of them and stored once, when the last has read them.

Softcapped models: load them with `attn_implementation="eager"` where transformers would take `sdpa` (5.17 does): that leaves the
softcap out in layers that stay exact. Folded layers apply it always.

Beside these, `tests/adapters/test_composite.py` holds: encoder-decoders (Bart) fold the decoder's own attention in
`EncoderDecoderCache(FoldedCache(config), DynamicCache())` and keep cross-attention exact (T5, M2M-100 and their like as well); positions in three axes (Qwen2-VL with an
image) are equal, ten families that see are equal on text (Gemma 3, Qwen3-VL, Qwen3.5, Kimi-K2.5, InternVL, Llava and others); images that
attend to themselves in both directions (Gemma 3 with images, PaliGemma) and caches that hold cross-attention (Mllama) are refused.
"""
TAIL = """
## Quantized weights

`pip install 'kvfold[quantized]'`. Caches know nothing of weights, so checkpoints of these kinds generate and are measured like any other,
and `tests/cli/test_quantized.py` holds copies of the shipped model to the stock cache: torchao int8 (weights; weights and activations) and
int4, bitsandbytes int8 and nf4, compressed-tensors packed int4, int8 and float8, GGUF Q8_0 and Q4_0. They keep the dtype they were saved with, whatever `--dtype` says. `weights_bytes` in
`cache.report(model)`, `generate --json` and `eval --json` is every byte in memory: codes, scales, zero points, code books. torchao's int4 takes a
byte per code on CPUs. transformers unpacks GGUF files where it has no kernels for their blocks (CPUs): `kvfold plan` has the
file's bytes, `weights_bytes` what lies in memory. Activations of 8 bits turn other roundings into other codes, so that two caches agree no
better than one cache with itself when calls are cut elsewhere. compressed-tensors are unpacked by
their library, in the first call, where it has no kernels for them (CPUs): codes until then, 16 bits from then on. GPTQ and AWQ need GPTQModel:
7.7.0 asks for torch 2.14.1, where everything else here was tested with 2.13.0, and for `optimum`; without them they are refused by name. A GPTQ
copy of the shipped model (4 bits, groups of 64, made on a CPU by it) ran once, by hand, with `GPTQConfig(bits=4, backend="torch")` on a CPU: logits of `lossless` within 3e-5
of the stock cache's, 12.5 MB of weights in the report. Its own quantizer to AWQ did not start on two cores (`Virtual pool 'model_loader:cpu' requests 2 workers
but parent 'cpu' only has 1`), so AWQ was not tried.
"""


def outcome(family: str) -> str:
    """`equal`, or why the family is refused. Raises AssertionError where logits differ."""
    model = make(family)
    try:
        with kvfold.attach(model):
            got = logits_of(model, kvfold.FoldedCache(model.config, "lossless"))
    except KvfoldError as error:
        return str(error).split(". ")[0]
    want = logits_of(model, DynamicCache(config=model.config))
    if float((got - want).abs().max()) >= ROUNDING * float(want.std()):
        raise AssertionError(f"{family}: a lossless cache does not give the logits of the stock cache")
    return "equal"


def described(family: str) -> list[dict[str, Any]]:
    """Layers of the family's default config, or of the tiny one where the defaults describe no model that was published."""
    try:
        layers = layers_of(CONFIG_MAPPING[family](), device="cpu")
    except (KvfoldError, TypeError, ValueError, KeyError):
        layers = []
    known = all(r["kind"] != "unknown" for r in layers)
    plausible = layers and known and all(r["folds"] for r in layers if r["kind"] == "full")
    return layers if plausible else layers_of(config(family), device="cpu")


def row_of(family: str) -> tuple[str, bool]:
    """The table's row, and whether the family is equal."""
    said = outcome(family)
    layers = described(family) if said == "equal" else []
    windows = [r for r in layers if r["folds"] and r["kind"] in SLIDING]
    folded = [r for r in layers if r["folds"] and r not in windows]
    exact = [r for r in layers if not r["folds"] and r["kind"] in (*SLIDING, "hybrid_sliding")]
    state = [r for r in layers if r["kind"] in ("linear", "conv", "hybrid", "hybrid_sliding")]
    counts = [str(len(x)) if x else "" for x in (folded, windows, exact, state)]
    engines = ", ".join(sorted({r["engine"] for r in folded + windows}))
    return f"| `{family}` | " + " | ".join([*counts, engines, said]) + " |", said == "equal"


def main() -> None:
    torch.set_num_threads(1)
    rows = [row_of(f) for f in FAMILIES]
    equal = sum(e for _, e in rows)
    lines = [
        HEAD,
        f"{equal} of {len(rows)} families equal, {len(rows) - equal} refused (transformers {transformers.__version__}).\n",
        "| model type | folded | windows | exact | state | engine | lossless against stock |",
        "|---|---|---|---|---|---|---|",
        *(r for r, _ in rows),
    ]
    DOC.write_text("\n".join(lines) + "\n" + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main()
