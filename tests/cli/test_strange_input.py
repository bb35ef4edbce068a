"""Broken folders, files, options and profiles: a sentence that says what to do, never a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.families import FAMILIES, config

from kvfold.cli.main import main
from kvfold.loading import check_decodes, demo_folder, describe

SIDES = '[key]\ncodec = "mse"\nbits = 3\n[value]\ncodec = "mse"\nbits = 3\n'
BALANCED = 'base = "balanced"\npurpose = "x"\n'
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Run a verb that must fail; its error object."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--json"])
    out = capsys.readouterr().out
    error: dict[str, str] = json.loads(out.splitlines()[-1])["error"]
    assert stop.value.code in (1, 2), out
    assert error["cure"], error
    assert "bug" not in error["cure"], error
    return error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be broken."""
    copy = tmp_path / "model"
    shutil.copytree(demo_folder(), copy)
    return copy


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


GENERATE = ("--prompt", "hello", "--max-new-tokens", "1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "nn"), "dtype"),
        (("--dtype", "int8"), "dtype"),
        (("--device", "potato"), "device"),
        (("--device", "meta"), "device"),
        (("--chat-template", "/nonexistent"), "template"),
    ],
)
def test_options_of_loading(capsys, options, words):
    assert words in fails(capsys, "generate", "demo", *GENERATE, *options)["message"]


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "model.safetensors"), (b"\xff" * 5000, "model.safetensors"), (None, "cut short")]
)
def test_weights_that_are_not_whole(capsys, folder, content, words):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000] if content is None else content)
    assert words in fails(capsys, "plan", str(folder))["message"]
    fails(capsys, "generate", str(folder), *GENERATE)


def test_weights_of_another_model(capsys, folder):
    change(folder, hidden_size=256)
    assert "other shapes" in fails(capsys, "generate", str(folder), *GENERATE)["message"]


def test_without_a_tokenizer(capsys, folder):
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in fails(capsys, "generate", str(folder), *GENERATE)["message"]
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer" in fails(capsys, "generate", str(folder), *GENERATE)["message"]


@pytest.mark.parametrize(
    "keys", [{"num_hidden_layers": "three"}, {"num_attention_heads": 0}, {"num_attention_heads": 5}]
)
def test_configs_that_transformers_refuses(capsys, folder, keys):
    change(folder, **keys)
    for verb in (("plan",), ("doctor",), ("generate", *GENERATE)):
        fails(capsys, verb[0], str(folder), *verb[1:])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"num_attention_heads": -2}, "num_attention_heads is -2"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 10**9}, "num_key_value_heads is 1,000,000,000"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads share 3"),
        ({"torch_dtype": 7, "dtype": 7}, "dtype"),
        ({"text_config": {}}, "to_dict"),
    ],
)
def test_sizes_that_cannot_be(capsys, folder, keys, words):
    """Said before anything is built from them."""
    change(folder, **keys)
    for source in (folder, folder / "config.json"):
        for verb in ("plan", "doctor"):
            assert words in fails(capsys, verb, str(source))["message"]


@pytest.mark.parametrize("window", [-1, 0])
def test_windows_that_cannot_be(capsys, tmp_path, window):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, "model_type": "gemma3_text", "sliding_window": window}))
    for verb in ("plan", "doctor"):
        assert "window" in fails(capsys, verb, str(path))["message"]


@pytest.mark.parametrize("text", ["[1]", '"text"', "{", "", '{"model_type": ["llama"]}', '{"model_type": "bert"}'])
def test_files_that_describe_no_decoder(capsys, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    for verb in ("plan", "doctor"):
        assert fails(capsys, verb, str(path))["kind"] in ("ModelError", "UnsupportedModel")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes(family):
    check_decodes(config(family))


def test_infinities_in_a_config(folder):
    """transformers writes them as objects, as in every saved Bamba."""
    change(folder, rope_parameters={"rope_type": "default", "rope_theta": {"__float__": "Infinity"}})
    assert describe(str(folder)).model.name == "llama"


def test_weights_are_counted_once(tmp_path):
    """Folders as Mistral publishes them hold all weights twice."""
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for name, n in (("model-1.safetensors", 10), ("model-2.safetensors", 20), ("consolidated.safetensors", 30)):
        save_file({name: np.zeros(n, np.float32)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    weights = describe(str(tmp_path)).weights
    assert weights is not None
    assert weights.bytes == 120


@pytest.mark.parametrize(
    "options",
    [
        ("--weights-bits", "nan"),
        ("--weights-bits", "-1"),
        ("--device", "potato"),
        ("--context", "4k,8k"),
        ("--compare", "--plot", "/nonexistent/x.png"),
        ("--compare", "--plot", "x.docx"),
    ],
)
def test_options_of_plan(capsys, options):
    fails(capsys, "plan", "demo", *options)


def test_outputs_are_checked_before_the_work(capsys):
    fails(capsys, "needle", "demo", "--plot", "/nonexistent/x.png")
    fails(capsys, "tune", "demo", "--output", "/nonexistent/x.toml")


def test_memory_of_no_tokens_and_of_no_model(capsys):
    fails(capsys, "memory", "demo", "--context", "0")
    assert fails(capsys, "memory", "/nonexistent")["kind"] == "ModelNotFound"


@pytest.mark.parametrize(
    "text",
    [
        BALANCED + 'window = "a"',
        BALANCED + "window = 1.5",
        BALANCED + "sinks = true",
        BALANCED + "sinks = 1.0",
        BALANCED + 'centre = "yes"',
        BALANCED + "key = 3",
        'purpose = "x"\n' + SIDES.replace("bits = 3", 'bits = "3"', 1),
        'purpose = "x"\n' + SIDES.replace("bits = 3", "bits = true", 1),
        'purpose = "x"\n' + SIDES.replace('"mse"', "5", 1),
        'purpose = "x"\ntolerance = { kld_mean = "a", top1_agreement = 1 }\n' + SIDES,
        "= 3",
        "",
    ],
)
def test_profiles_that_say_nothing(capsys, tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert str(path) in fails(capsys, "generate", "demo", *GENERATE, "--profile", str(path))["message"]


def test_profiles_without_a_form_for_the_head_size_are_left_out(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, "head_dim": 20}))
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(path), "--context", "1k", "--compare", "--json"])
    out, err = capsys.readouterr()
    profiles = {r["profile"] for r in json.loads(out)["rows"]}
    assert not stop.value.code
    assert "turbo-3" in profiles
    assert "balanced" not in profiles
    assert "balanced" in err
