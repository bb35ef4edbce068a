"""Sessions behind the server: prompts find what was read before, names, slots, the disk, and what metrics say of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from tests.server.running import Running, running

from kvfold.errors import KvfoldError
from kvfold.loading import DEMO, Loaded
from kvfold.serving.generation import Generation
from kvfold.serving.shelf import Keep, Place
from kvfold.sessions.runner import Runner
from kvfold.sessions.session import Session

DOCUMENT = [5 + (i * i) % 900 for i in range(900)]
BEFORE = [{"role": "user", "content": "The function returns an error when the"}]


@pytest.fixture
def kept(loaded: Loaded, tmp_path: Path) -> Iterator[Running]:
    with running(loaded, keep=Keep("200MB", tmp_path)) as r:
        yield r


def complete(r: Running, prompt: Any, tokens: int = 8, **asked: Any) -> dict[str, Any]:
    body = {"model": DEMO, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **asked}
    response = httpx.post(r.url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def alone(r: Running, prompt: list[int], steps: int) -> list[int]:
    """Greedy tokens of a run of its own that never saw another prompt, cut on the same grid."""
    runner = Runner(r.model.model, r.model.tokenizer, call_tokens=r.model.runner.call_tokens)
    session, out = Session(runner), []
    logits = session.extend(prompt)
    for _ in range(steps):
        out.append(int(logits.argmax()))
        logits = session.extend(out[-1:])
    return out


def test_a_prompt_goes_on_from_what_was_read_before(kept: Running) -> None:
    """The same tokens and log-probabilities as a run that read everything, cut at the same places."""
    questions = [[20 + i, 30 + i, 40 + i] * 4 for i in range(3)]
    answers = [complete(kept, DOCUMENT + q, logprobs=2) for q in questions]
    assert [cached(a) for a in answers] == [0, 896, 896]  # the last end of a call in the document
    for q, a in zip(questions, answers, strict=True):
        expected = alone(kept, DOCUMENT + q, 8)
        assert a["choices"][0]["text"] == kept.model.tokenizer.decode(expected)
    with running(kept.loaded, keep=Keep("200MB")) as fresh:
        for q, a in zip(questions[1:], answers[1:], strict=True):
            assert complete(fresh, DOCUMENT + q, logprobs=2)["choices"][0]["logprobs"] == a["choices"][0]["logprobs"]
            fresh.model.scheduler.call(lambda: [fresh.model.shelf.store.remove(n) for n in _all(fresh)]).result(30)


def _all(r: Running) -> list[str]:
    return [x["name"] for x in r.model.shelf.store.sessions()]


def test_a_prompt_read_again_gives_the_same_bits(kept: Running) -> None:
    answers = [
        complete(kept, DOCUMENT, logprobs=2, **how) for how in ({}, {"cache_prompt": True}, {"cache_prompt": False})
    ]
    assert [cached(a) for a in answers] == [0, 896, 0]
    assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(kept: Running) -> None:
    with OpenAI(base_url=kept.url + "/v1", api_key="none") as client:
        messages: list[Any] = list(BEFORE)
        before = 0
        for turn in range(3):
            out = client.chat.completions.create(model=DEMO, messages=messages, max_tokens=12, temperature=0)
            assert out.usage is not None
            assert out.usage.prompt_tokens_details is not None
            # All that the turn before had read, and those tokens of its answer that its text gives back.
            assert out.usage.prompt_tokens_details.cached_tokens >= before
            before = out.usage.prompt_tokens
            messages += [out.choices[0].message, {"role": "user", "content": f" and the value of item {turn} is"}]


def test_named_sessions_list_save_restore_fork_delete(kept: Running, tmp_path: Path) -> None:
    url = kept.url + "/sessions"
    complete(kept, DOCUMENT, session="book")
    (row,) = httpx.get(url).json()["data"]
    assert (row["name"], row["tokens"], row["in_memory"], row["on_disk"]) == ("book", 907, True, False)
    assert row["bytes"] > 0
    assert row["ratio"] == pytest.approx(row["reference_bytes"] / row["bytes"])
    assert row["reference_bytes"] == 907 * sum(kept.model.runner.layer_reference_bytes)
    assert httpx.post(url + "/book/save").json()["on_disk"]
    assert (tmp_path / "book").is_dir()
    assert httpx.post(url + "/book/fork", json={"name": "copy"}).status_code == 201
    assert refusal(httpx.post(url + "/book/fork", json={"name": "copy"})) == (409, "session_exists")
    complete(kept, DOCUMENT[:200], session="book")
    assert httpx.get(url + "/book").json()["tokens"] == 207
    assert httpx.post(url + "/book/restore").json()["tokens"] == 907
    assert refusal(httpx.post(url + "/copy/restore")) == (404, "session_not_found")
    assert httpx.delete(url + "/book").json() == {"name": "book", "deleted": True}
    assert not (tmp_path / "book").exists()
    for response in (httpx.delete(url + "/book"), httpx.get(url + "/book"), httpx.post(url + "/book/save")):
        assert refusal(response) == (404, "session_not_found")
        assert str(tmp_path) not in response.text
    assert [x["name"] for x in httpx.get(url).json()["data"]] == ["copy"]


def test_a_damaged_file_does_not_cost_what_is_in_memory(kept: Running, tmp_path: Path) -> None:
    url = kept.url + "/sessions/book"
    complete(kept, DOCUMENT, session="book")
    httpx.post(url + "/save")
    complete(kept, DOCUMENT + DOCUMENT[:100], session="book")
    page_file = next((tmp_path / "book").glob("pages-*"))
    data = bytearray(page_file.read_bytes())
    data[-1] ^= 1
    page_file.write_bytes(data)
    damaged = httpx.post(url + "/restore")
    assert refusal(damaged) == (409, "damaged_session")
    assert str(tmp_path) not in damaged.text
    assert httpx.get(url).json()["tokens"] == 1007


def test_messages_come_back_after_a_restart_and_so_do_pages(loaded: Loaded, tmp_path: Path) -> None:
    body = {"model": DEMO, "messages": BEFORE * 20, "max_tokens": 10, "temperature": 0, "session": "talk"}
    with running(loaded, keep=Keep("200MB", tmp_path)) as r:
        first = httpx.post(r.url + "/v1/chat/completions", json=body, timeout=60).json()
    said = first["choices"][0]["message"]
    with running(loaded, keep=Keep("200MB", tmp_path)) as r:
        talk = httpx.get(r.url + "/sessions/talk").json()
        assert httpx.post(r.url + "/sessions/talk/save").json()["tokens"] == talk["tokens"]
        assert not talk["in_memory"]  # neither looking nor saving brings it back
        assert talk["messages"] == [*BEFORE * 20, {"role": "assistant", "content": said["content"]}]
        body["messages"] = [*talk["messages"], *BEFORE]
        second = httpx.post(r.url + "/v1/chat/completions", json=body, timeout=60).json()
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
        assert len(httpx.get(r.url + "/sessions/talk").json()["messages"]) == 23


def test_slots_as_llama_server_has_them(kept: Running) -> None:
    slots = httpx.get(kept.url + "/slots").json()
    assert [s["id"] for s in slots] == list(range(16))
    complete(kept, DOCUMENT[:300], id_slot=1, cache_prompt=True)
    assert [s["n_tokens"] for s in httpx.get(kept.url + "/slots").json()][:3] == [0, 307, 0]

    def act(slot: int, action: str, filename: str | None = None) -> httpx.Response:
        body = {"filename": filename} if filename else {}
        return httpx.post(f"{kept.url}/slots/{slot}", params={"action": action}, json=body)

    saved = act(1, "save", "slot.bin").json()
    assert (saved["id_slot"], saved["filename"], saved["n_saved"]) == (1, "slot.bin", 307)
    assert saved["n_written"] > 0
    erased = httpx.post(kept.url + "/slots/1?action=erase")  # clients send no body here
    assert erased.json() == {"id_slot": 1, "n_erased": 307}
    assert act(2, "restore", "slot.bin").json()["n_restored"] == 307
    assert cached(complete(kept, DOCUMENT[:320], id_slot=2)) >= 256
    act(2, "save", "slot.bin")  # over what is there
    assert refusal(act(1, "save", "slot.bin")) == (404, "session_not_found")
    assert refusal(act(16, "save", "slot.bin")) == (404, "not_found")
    assert refusal(act(2, "save")) == (400, "missing_required_parameter")
    assert refusal(act(2, "format", "x")) == (400, "invalid_value")


@pytest.mark.parametrize(
    "name", ["..", "../x", "%2e%2e%2fx", ".hidden", "a" * 101, "a%00b", "x.tmp", "auto-1", "a%2Fb"]
)
def test_no_name_leaves_the_folder(kept: Running, tmp_path: Path, name: str) -> None:
    plain = name.replace("%2e", ".").replace("%2f", "/").replace("%2F", "/").replace("%00", "\0")
    body = {"model": DEMO, "prompt": "a", "session": plain}
    assert refusal(httpx.post(kept.url + "/v1/completions", json=body))[0] == 400
    complete(kept, DOCUMENT[:20], session="mine")
    assert refusal(httpx.post(kept.url + "/sessions/mine/fork", json={"name": plain}))[0] == 400
    assert refusal(httpx.post(kept.url + f"/sessions/{name}/save"))[0] in (400, 404, 405)
    assert refusal(httpx.post(kept.url + "/slots/0?action=save", json={"filename": plain}))[0] in (400, 404)
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_comes_to_nothing_leaves_its_session_as_it_was(kept: Running) -> None:
    complete(kept, DOCUMENT, session="book")
    stream = kept.model.stream([7] * 4000, Generation(max_tokens=2), Place("book"))
    stream.cancel()
    with pytest.raises(KvfoldError):
        stream.read()
    assert kept.model.scheduler.call(lambda: kept.model.shelf.row("book")).result(30)["tokens"] == 907


def test_more_than_memory_holds_goes_to_the_disk_and_comes_back(loaded: Loaded, tmp_path: Path) -> None:
    with running(loaded, keep=Keep("16MB", tmp_path, watch=2)) as r:
        for i in range(6):
            complete(r, [i + x for x in DOCUMENT], session=f"book{i}")
        rows = httpx.get(r.url + "/sessions").json()
        assert 0 < rows["memory"]["bytes"] <= rows["memory"]["limit_bytes"] == 16_000_000
        assert not all(x["in_memory"] for x in rows["data"])
        assert cached(complete(r, DOCUMENT + [9], session="book0")) >= 896
        text = httpx.get(r.url + "/metrics").text
        values = {k: float(v) for k, v in (x.rsplit(" ", 1) for x in text.splitlines() if not x.startswith("#"))}
        assert values["kvfold_sessions_written_out_total"] >= 1
        assert values["kvfold_sessions_brought_back_total"] >= 1
        assert values["kvfold_prefix_lookups_total"] == 7
        assert values["kvfold_prefix_hits_total"] == 1
        assert values["kvfold_reused_tokens_total"] >= 896
        assert values['kvfold_cache_bytes{kind="pages"}'] > 0
        assert sum(v for k, v in values.items() if k.startswith("kvfold_cache_bytes")) <= 16_000_000
        assert values['kvfold_fidelity_samples{layer="0"}'] >= 1
        assert 0 < values['kvfold_fidelity_score_error{layer="0"}'] < 1
        assert values['kvfold_live_requests{state="running"}'] == 0


def test_too_little_memory_is_said_so(loaded: Loaded) -> None:
    with running(loaded, keep=Keep("4MB")) as r:
        body = {"model": DEMO, "prompt": [5] * 20_000, "max_tokens": 2}
        never = httpx.post(r.url + "/v1/completions", json=body, timeout=60)
        assert refusal(never) == (400, "context_length_exceeded")
        assert "bytes of memory, and all requests together may take 4,000,000" in never.json()["error"]["message"]
        health = httpx.get(r.url + "/health").json()
        assert health["requests"] == {"running": 0, "waiting": 0}
        assert 0 <= health["memory"]["used_bytes"] <= health["memory"]["limit_bytes"] == 4_000_000
        assert refusal(httpx.post(r.url + "/sessions/x/save")) == (404, "session_not_found")
        complete(r, [5, 6, 7], session="small")
        refused = httpx.post(r.url + "/sessions/small/save")
        assert refusal(refused) == (400, "invalid_value")
        assert "disk" in json.loads(refused.text)["error"]["message"]
