"""One server per worker, for tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI
from tests.server.running import Running, running

from kvfold.loading import Loaded, load


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    return load("demo")


@pytest.fixture(scope="session")
def served(loaded: Loaded) -> Iterator[Running]:
    with running(loaded) as r:
        yield r


@pytest.fixture
def client(served: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as c:
        yield c
