"""`kvfold plan` and `kvfold doctor` of the default config of every model type of transformers that writes text: an answer or a
refusal that says what to do, never a traceback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING

from kvfold import diagnosis, loading
from kvfold.broken import raised
from kvfold.errors import KvfoldError
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load

CONTEXT = 4096


def outcome(run: Callable[[], Any]) -> str:
    """`answers`, `refuses`, or what it broke with."""
    try:
        run()
    except KvfoldError as error:
        return "refuses" if error.message and error.cure else f"no cure: {error}"
    except (*raised(), AssertionError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "answers"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A config.json for every model type that writes text, or holds one that does, and whose config class has defaults."""
    folder, made = tmp_path_factory.mktemp("configs"), {}
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in CONFIG_MAPPING:
            with suppress(Exception):  # a class of errors per library: none of them is ours
                config = CONFIG_MAPPING[kind]()
                if not any(type(x) in m for m in loading._generating() for x in (config, config.get_text_config())):
                    continue
                config.save_pretrained(folder / kind)
                made[kind] = str(folder / kind / "config.json")
    transformers.utils.logging.set_verbosity(before)
    return made


@pytest.mark.parametrize("verb", ["plan", "doctor"])
def test_no_config_is_answered_by_a_traceback(
    verb: str, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parameters are counted by building models, which is transformers' work and takes minutes for all of them.
    monkeypatch.setattr(loading, "_counted", lambda config: None)
    setting = Setting(load("balanced").spec, CONTEXT)

    def run(source: str) -> Any:
        if verb == "doctor":
            return diagnosis.model_layers(source)
        return plan(loading.describe(source).model, setting)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = {kind: outcome(lambda source=source: run(source)) for kind, source in sources.items()}
    assert {k: said for k, said in outcomes.items() if said not in ("answers", "refuses")} == {}
    answered = [k for k, said in outcomes.items() if said == "answers"]
    assert len(answered) > len(sources) // 2, answered
