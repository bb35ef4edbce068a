"""Requests made up from the OpenAPI document: no crash, no hang, and nothing the document does not say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.server.running import running

from kvfold.loading import DEMO, Loaded
from kvfold.server.app import create_app
from kvfold.server.guard import Rules

SECONDS = 60  # of one request; a model with 64 tokens of context is done long before
FAST, FULL = 10, 400
QUIET = [
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
    HealthCheck.function_scoped_fixture,
]


def document() -> dict[str, Any]:
    """The server's own, with the one model's name said, or hardly a request would get past it."""
    no_service: Any = None
    made = create_app(no_service, Rules()).openapi()
    for name in ("ChatBody", "CompletionBody"):
        made["components"]["schemas"][name]["properties"]["model"]["const"] = DEMO
    return made


sent = Counter[str]()  # by operation
schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def url(loaded: Loaded, record_testsuite_property: Callable[[str, object], None]) -> Iterator[str]:
    with running(loaded, max_context=64) as r:
        yield r.url
    record_testsuite_property("requests made up from the OpenAPI document", sent.total())


def check(case: Any, url: str) -> None:
    """What a schema cannot say (an empty prompt, a context that is too short) is refused: that valid data can be."""
    sent[case.operation.label] += 1
    case.call_and_validate(base_url=url, timeout=SECONDS, excluded_checks=[positive_data_acceptance])


@schema.parametrize()
@settings(max_examples=FAST, deadline=None, suppress_health_check=QUIET, phases=[Phase.explicit, Phase.generate])
def test_requests_from_the_document(case: Any, url: str) -> None:
    check(case, url)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=FULL, deadline=None, suppress_health_check=QUIET)
def test_many_requests_from_the_document(case: Any, url: str) -> None:
    check(case, url)
