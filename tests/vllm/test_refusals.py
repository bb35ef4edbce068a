"""What the plug-in does not do in vLLM is refused when the model is built, by name."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from engines import environment, run

from kvfold.errors import Unsupported

OTHER = "from kvfold.adapters import vllm; vllm.TESTED = ('0.0.1',); vllm.register()"


def test_a_version_that_was_not_tested() -> None:
    refused = subprocess.run([sys.executable, "-c", OTHER], env=environment("balanced"), capture_output=True, text=True)
    assert refused.returncode != 0
    assert "was not tested with kvfold" in refused.stderr
    forced = subprocess.run([sys.executable, "-c", OTHER], env=environment("balanced", KVFOLD_VLLM_FORCE="1"))
    assert forced.returncode == 0


@pytest.mark.parametrize(
    ("profile", "options", "words"),
    [
        ("nonsense", {}, "unknown profile"),
        ("balanced", {"kv_cache_dtype": "fp8"}, "no --kv-cache-dtype fp8"),
        ("faithful-3.5", {}, "no codec 'split'"),
        ("balanced", {"disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
    ],
)
def test_options_that_do_not_go_together(profile: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run(profile, [], **options)


def test_the_first_model_runner_unless_asked_otherwise() -> None:
    code = "import os; from kvfold.adapters import vllm; vllm.register(); print(os.environ['VLLM_USE_V2_MODEL_RUNNER'])"
    env = environment("balanced")
    del env["VLLM_USE_V2_MODEL_RUNNER"]
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == "0"


def test_the_second_model_runner() -> None:
    """Which vLLM refuses by itself where there is no Triton."""
    from kvfold.adapters.vllm.attention import refuse_config

    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
        parallel_config=None,
        use_v2_model_runner=True,
    )
    with pytest.raises(Unsupported, match="no second model runner"):
        refuse_config(config)
