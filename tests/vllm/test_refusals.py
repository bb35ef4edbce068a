"""What the plug-in does not do in vLLM is refused when the model is built, by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from engines import environment, run

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
def test_options_that_do_not_go_together(profile: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run(profile, [], **options)
