"""The load test, briefly: it measures a server that answers, and reports one that does not."""

from __future__ import annotations

import pytest

from kvfold.errors import EvaluationError
from kvfold.server.measure import Seen, run, serving


@pytest.mark.slow
def test_a_short_load_test() -> None:
    figures = run("demo", "balanced", minutes=0.1, clients=3, document=1024, memory="256MiB")
    assert figures["errors"] == 0, figures["first_error"]
    assert figures["requests"] >= 3
    assert figures["tokens_per_s"] > 0
    assert figures["fresh_over_reuse"] > 1
    assert figures["equal_answers"] == 10
    assert 0 < figures["most_cache_bytes"] <= figures["cache_limit_bytes"] == 256 << 20
    assert figures["most_cache_bytes"] <= figures["most_promised_bytes"]
    assert 0 < figures["inter_token_p50_ms"] <= figures["inter_token_p99_ms"]


@pytest.mark.slow
def test_a_server_that_refuses_is_said_so() -> None:
    with pytest.raises(EvaluationError, match="did not start"), serving("no-such-model", "balanced", "256MiB"):
        pass
    with (
        serving("demo", "balanced", "4MB") as target,
        pytest.raises(EvaluationError, match=r"need [\d,]+ bytes of memory"),
    ):
        target.ask([5] * 30_000, 2, Seen())
