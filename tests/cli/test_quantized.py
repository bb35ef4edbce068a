"""Models with quantized weights: folded caches beside torchao's, bitsandbytes' and GGUF's, every byte of both counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import copies
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import kvfold
from kvfold.adapters.hf_weights import weights_bytes
from kvfold.cli import main
from kvfold.loading import demo_folder, describe
from kvfold.planner.weights import of_gguf

KINDS = tuple(copies.CONFIGS)
# Of the spread of the logits. The model without quantized weights: .013, in bfloat16. Activations rounded to 8 bits turn
# other roundings into other codes: the stock cache changes by .040 when one of these reads the same tokens in other cuts.
ROUNDING = {
    **dict.fromkeys([*KINDS, *copies.COMPRESSED], 0.02),
    "torchao int8, activations too": 0.09,
    "bitsandbytes int8": 0.09,
}
GGUF_BITS = {"Q8_0": 8.5, "Q4_0": 4.5}  # per value of a matrix


@pytest.fixture(scope="module")
def copy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("copy")
            made[kind] = copies.save_gguf(kind, folder / "m.gguf") if kind in GGUF_BITS else copies.save(kind, folder)
        return made[kind]

    return find


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON object that a command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert ended.value.code == (1 if "error" in printed else 0), printed
    return printed


def linear(model: torch.nn.Module) -> list[tuple[int, int]]:
    """(rows, values) of the matrices that libraries quantize: all but the embedding, which is also the head."""
    return [(x.shape[0], x.numel()) for n, x in model.named_parameters() if x.dim() == 2 and "embed" not in n]


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_quantized_weights_is_counted(copy_of: Callable[[str], Path], kind: str) -> None:
    plain = copies.plain()
    matrices = linear(plain)
    want = weights_bytes(plain) - 2 * sum(n for _, n in matrices)
    want += sum(copies.LINEAR_BYTES[kind](*m) for m in matrices)
    model = AutoModelForCausalLM.from_pretrained(copy_of(kind))
    assert weights_bytes(model) == want
    with torch.no_grad(), kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config)
        model(torch.arange(300)[None], past_key_values=cache)
    if kind == "bitsandbytes nf4" and weights_bytes(model) != want:
        # Where the processor multiplies bfloat16, the first call turns scales of one byte, with a table of 256 and scales of
        # their own for 256 of them, into bfloat16.
        blocks = [n // 64 for _, n in matrices]
        want += sum(n - 4 * -(-n // 256) - 4 * 256 for n in blocks)
    report = cache.report(model)
    assert (report["weights_bytes"], report["cache_bytes"]) == (want, cache.nbytes)
    assert report["layers"][0]["folded_tokens"] > 0


def test_weights_of_an_ordinary_model_and_buffers() -> None:
    model = copies.plain()
    buffers = {x.untyped_storage().data_ptr(): x.nbytes for x in model.buffers()}
    assert weights_bytes(model) == sum(x.nbytes for x in model.parameters()) + sum(buffers.values())
    assert "weights_bytes" not in kvfold.FoldedCache(model.config).report()


@pytest.mark.parametrize(("kind", "codes"), [("int4", 0.5 + 2 / copies.GROUP), ("int8", 1.0), ("fp8", 1.0)])
def test_compressed_tensors_are_codes_until_the_first_call(
    copy_of: Callable[[str], Path], kind: str, codes: float
) -> None:
    """Then its library unpacks them, where it has no kernels for them."""
    plain = copies.plain()
    matrices = linear(plain)
    outer = weights_bytes(plain) - 2 * sum(n for _, n in matrices)
    beside = 16 * len(matrices) if kind != "fp8" else 0  # shapes of what is packed
    beside += 2 * sum(rows for rows, _ in matrices) if kind != "int4" else 0  # a scale per row
    folder = copy_of(f"compressed-tensors {kind}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert weights_bytes(model) == outer + codes * sum(n for _, n in matrices) + beside
    weights = describe(str(folder)).weights
    assert weights is not None
    assert weights.parameters is None  # packed codes
    with torch.no_grad(), kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config)
        model(torch.arange(300)[None], past_key_values=cache)
    assert weights_bytes(model) > outer + 2 * sum(n for _, n in matrices)
    assert cache.report(model)["weights_bytes"] == weights_bytes(model)


@pytest.mark.parametrize("kind", [*KINDS, *copies.COMPRESSED])
def test_lossless_is_stock_with_quantized_weights(copy_of: Callable[[str], Path], kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy_of(kind)).eval()
    ids = torch.arange(300)[None] % 97 + 5
    outs = []
    with torch.no_grad(), kvfold.attach(model):
        for cache in (DynamicCache(config=model.config), kvfold.FoldedCache(model.config, "lossless")):
            parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 200), (200, 299), (299, 300))]
            outs.append(torch.cat(parts, 1).float())
    assert float((outs[0] - outs[1]).square().mean().sqrt()) < ROUNDING[kind] * float(outs[0].std())


@pytest.mark.parametrize("kind", [*KINDS, *copies.COMPRESSED, *GGUF_BITS])
def test_eval_and_generate(copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], kind: str) -> None:
    where = str(copy_of(kind))
    window = ("--windows", "1", "--window-tokens", "512")
    own, shipped = (run(capsys, "eval", source, *window) for source in (where, "demo"))
    assert own["kld_mean"] < (0.02 if ROUNDING.get(kind, 0) > 0.02 else 0.005)  # measured: .008, and .0018 at most
    assert own["perplexity_reference"] == pytest.approx(shipped["perplexity_reference"], rel=0.15)
    text = run(capsys, "generate", where, "--prompt", "The borrow checker", "--max-new-tokens", "5")
    assert len(text["tokens"]) == 5
    assert 0 < text["cache_bytes"] < text["weights_bytes"]


@pytest.mark.parametrize("kind", GGUF_BITS)
def test_plan_reads_gguf_files(copy_of: Callable[[str], Path], kind: str) -> None:
    """The file's own bytes; in memory transformers unpacks them where it has no kernels for their blocks."""
    found, shipped = describe(str(copy_of(kind))), describe("demo")
    assert found.model.layers == shipped.model.layers
    assert found.weights is not None
    matrices = sum(x.numel() for x in copies.plain().parameters() if x.dim() == 2)
    norms = sum(x.numel() for x in copies.plain().parameters() if x.dim() == 1)
    assert found.weights == of_gguf(copy_of(kind))[1]
    assert found.weights.bytes == matrices * GGUF_BITS[kind] / 8 + 4 * norms


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_library_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    for file in demo_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = run(capsys, "generate", str(tmp_path), "--prompt", "The")["error"]
    assert error["kind"] == "ModelError"
    assert "gptqmodel" in error["message"].lower() or "optimum" in error["message"].lower()
