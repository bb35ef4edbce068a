"""Prompts kept on disk by one vLLM process and continued by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Run, prompt, run, step

LONG = 16_384
OPTIONS = {"max_model_len": 20_000, "max_num_batched_tokens": 2048}


def through(profile: str, folder: Path, steps: list[dict[str, Any]], **options: Any) -> Run:
    transfer = {
        "kv_connector": "FoldedConnector",
        "kv_connector_module_path": "kvfold.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(folder)},
    }
    return run(profile, steps, kv_transfer_config=transfer, **{**OPTIONS, **options})


@pytest.mark.parametrize(("profile", "length"), [("lossless", 4096 + 77), ("balanced", 4096), ("balanced", LONG + 77)])
def test_a_second_process_continues_from_disk(profile: str, length: int, tmp_path: Path) -> None:
    long, short = prompt(0, length), prompt(9, 300)
    first = through(profile, tmp_path, [step(long, short)])
    second = through(profile, tmp_path, [step(long, short), step(prompt(0, length + 200), short[:200] + short)])
    assert first.cached(0) == [0, 0]
    assert second.cached(0)[0] >= 0.95 * length
    assert second.cached(0)[1] == 256
    assert second.ids(0) == first.ids(0)
    fresh = run(profile, [step(long), step(prompt(0, length + 200))], enable_prefix_caching=False, **OPTIONS)
    assert second.ids(0)[0] == fresh.ids(0)[0]
    if profile == "lossless":
        assert second.ids(1)[0] == fresh.ids(1)[0]


def test_damaged_pages_are_computed_again(tmp_path: Path) -> None:
    long = prompt(0, 3000)
    first = through("balanced", tmp_path, [step(long)], max_num_batched_tokens=1024)
    files = sorted(tmp_path.rglob("pages-*.safetensors"))
    assert len(files) == 3
    middle = next(f for f in files if f.name.startswith("pages-00000008"))
    content = bytearray(middle.read_bytes())
    content[-1000] ^= 1
    middle.write_bytes(content)
    second = through("balanced", tmp_path, [step(long)], max_num_batched_tokens=1024)
    assert 1024 <= second.cached(0)[0] < 2048
    assert second.ids(0) == first.ids(0)


def test_answers_are_kept_and_answers_of_another_profile_are_not_found(tmp_path: Path) -> None:
    asked = prompt(3, 500)
    first = through("balanced", tmp_path, [step(asked, max_tokens=300, ignore_eos=True)])
    talk = asked + first.ids(0)[0] + prompt(4, 50)
    second = through("balanced", tmp_path, [step(talk)])
    assert second.cached(0) == [(len(asked) + 299) // 128 * 128]
    assert through("compact", tmp_path, [step(talk)]).cached(0) == [0]


def test_heads_split_over_two_workers(tmp_path: Path) -> None:
    two = {"tensor_parallel_size": 2, "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}}
    long = prompt(0, 3000)
    first, second = (through("balanced", tmp_path, [step(long)], **two) for _ in range(2))
    assert second.cached(0)[0] >= 0.95 * len(long)
    assert second.ids(0) == first.ids(0)
