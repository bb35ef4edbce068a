"""The web page in a real browser: chat, sessions, memory, needles; with a keyboard, on a phone, and as axe-core sees it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.running import Running, running, wait_for

from kvfold.loading import DEMO, Loaded
from kvfold.server.guard import Rules
from kvfold.server.page import FILES
from kvfold.serving.shelf import Keep

PHONE, DESK = (375, 740), (1280, 850)


def test_the_page_is_all_from_here_and_nothing_is_inline(served: Running) -> None:
    page = httpx.get(served.url + "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name, content in FILES.items():
        got = httpx.get(f"{served.url}/page/{name}")
        assert got.content == content
        assert got.headers["content-security-policy"] == policy
        addresses = re.findall(rb"https?://[^\"' )]+", content)
        assert set(addresses) <= {b"http://www.w3.org/2000/svg"}
    html = FILES["index.html"].decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name in ("..%2fpage.py", "%2e%2e/page.py", "nothing.js"):
        assert httpx.get(f"{served.url}/page/{name}").status_code == 404


def test_needles_are_where_the_text_says(served: Running) -> None:
    found = httpx.post(served.url + "/needle", json={"context": 2048, "seed": 3}, timeout=60).json()
    text = served.model.tokenizer.decode(found["document"])
    assert [n["depth"] for n in found["needles"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for n in found["needles"]:
        assert n["statement"] in text
        assert n["answer"].strip() in n["statement"]
    assert httpx.post(served.url + "/needle", json={"context": 2}).status_code == 400


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("no chromium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for x in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--force-color-profile=srgb",
    ):
        options.add_argument(x)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def site(loaded: Loaded, tmp_path: Path) -> Iterator[Running]:
    with running(loaded, keep=Keep("300MB", tmp_path)) as r:
        yield r


def show(browser: Any, url: str, size: tuple[int, int] = DESK) -> None:
    """The page in a window whose inside has this size; what it logged before is forgotten."""
    browser.get_log("browser")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE},
    )
    browser.get(url)
    wait_for(lambda: DEMO in text(browser, "#model"))


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def text(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def say(browser: Any, message: str, answers: int) -> None:
    from selenium.webdriver.common.keys import Keys

    one(browser, "#prompt").send_keys(message, Keys.ENTER)
    wait_for(lambda: len(browser.find_elements("css selector", ".message.assistant:not(.writing)")) == answers, 60)
    wait_for(lambda: one(browser, "#send").is_displayed())


def quiet(browser: Any) -> None:
    """Nothing was refused by the policy, nothing failed."""
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []


def accessible(browser: Any) -> None:
    from axe_core_python.selenium import Axe

    found = Axe().run(browser, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    assert [(v["id"], v["help"], [n["html"] for n in v["nodes"]]) for v in found["violations"]] == []


def fits(browser: Any) -> bool:
    return bool(browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"))


@pytest.mark.slow
def test_a_chat_is_streamed_saved_and_opened_again(browser: Any, site: Running) -> None:
    show(browser, site.url)
    one(browser, "#settings summary").click()
    tokens = one(browser, "#max-tokens")
    tokens.clear()
    tokens.send_keys("24")
    one(browser, "#prompt").click()
    say(browser, "The function returns an error when the", 1)
    answer = text(browser, ".message.assistant .text")
    assert answer
    assert "24 tokens" in text(browser, ".message.assistant .quiet")
    name = text(browser, "#chat-name")
    rows = httpx.get(site.url + "/sessions").json()["data"]
    assert [r["name"] for r in rows] == [name]
    wait_for(lambda: name in text(browser, "#sessions"))
    assert f"{rows[0]['tokens']} tokens" in text(browser, "#sessions")
    one(browser, f'[aria-label="Save {name}"]').click()
    wait_for(lambda: "is saved" in text(browser, "#session-status"))
    say(browser, " and the value is", 2)
    assert not re.search("; 0 of", text(browser, ".message.assistant:last-child .quiet"))
    one(browser, f'[aria-label="Fork {name}"]').click()
    wait_for(lambda: f"{name}-fork" in text(browser, "#sessions"))
    browser.refresh()
    wait_for(lambda: f"{name}-fork" in text(browser, "#sessions"))
    one(browser, f'[aria-label="Open {name}"]').click()
    wait_for(lambda: len(browser.find_elements("css selector", ".message")) == 4)
    assert text(browser, ".message.assistant .text") == answer
    one(browser, f'[aria-label="Delete {name}-fork"]').click()
    wait_for(lambda: "fork" not in text(browser, "#sessions"))
    one(browser, "#new-chat").click()
    assert browser.find_elements("css selector", ".message") == []
    assert text(browser, "#chat-name") == "New chat"
    quiet(browser)


@pytest.mark.slow
def test_an_answer_can_be_stopped_and_a_mistake_is_said(browser: Any, site: Running) -> None:
    show(browser, site.url)
    browser.execute_script("document.getElementById('max-tokens').value = 90000")
    one(browser, "#prompt").send_keys("The function", "\ue007")
    wait_for(lambda: len(text(browser, ".message.assistant .text")) > 20)
    one(browser, "#stop").click()
    wait_for(lambda: site.model.scheduler.jobs == [])
    wait_for(lambda: one(browser, "#send").is_displayed())
    assert not one(browser, "#problem").is_displayed()
    browser.execute_script("document.getElementById('max-tokens').value = 990000")
    one(browser, "#prompt").send_keys("again", "\ue007")
    wait_for(lambda: one(browser, "#problem").is_displayed())
    assert "context ends at" in text(browser, "#problem")
    assert one(browser, "#prompt").get_attribute("value") == "again"


@pytest.mark.slow
def test_needles_are_found_and_memory_is_shown(browser: Any, site: Running) -> None:
    show(browser, site.url)
    one(browser, "#tab-needle").click()
    one(browser, "#needle-start").click()
    wait_for(lambda: "facts found" in text(browser, "#needle-status"), 120)
    assert len(browser.find_elements("css selector", "#needles li")) == 5
    assert int(text(browser, "#needle-status").split()[0]) >= 4
    notes = [x.text for x in browser.find_elements("css selector", "#needles .quiet")]
    assert ", 0 tokens read before" in notes[0]
    assert all(int(re.findall(r"([\d,]+) tokens read", n)[0].replace(",", "")) > 7000 for n in notes[1:])
    wait_for(lambda: "less than at 16 bits" in text(browser, "#memory-note"))
    memory = httpx.get(site.url + "/sessions").json()["memory"]
    # One text and five questions, not five texts: what is shared is counted once.
    assert 8150 < memory["reference_bytes"] / sum(site.model.runner.layer_reference_bytes) < 8150 + 5 * 1200
    folded, reference = (one(browser, s) for s in ("#folded", "#reference"))
    assert 0 < float(folded.get_attribute("aria-valuenow")) < float(reference.get_attribute("aria-valuenow"))
    assert folded.size["width"] < reference.size["width"]
    accessible(browser)
    quiet(browser)


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_and_everything_is_named(
    browser: Any, site: Running, size: tuple[int, int], scheme: str
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    show(browser, site.url, size)
    browser.execute_script("document.getElementById('max-tokens').value = 40")
    say(browser, "wordwithoutanyspace" * 20, 1)
    for tab in ("#tab-needle", "#tab-chat"):
        one(browser, tab).click()
        assert fits(browser)
        accessible(browser)


@pytest.mark.slow
def test_it_can_be_used_with_the_keyboard_alone(browser: Any, site: Running) -> None:
    from selenium.webdriver.common.keys import Keys

    def focused() -> str:
        return str(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))

    show(browser, site.url)
    wait_for(lambda: focused() == "prompt")
    browser.execute_script("document.querySelector('.skip').focus()")
    order = []
    for _ in range(6):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        order.append(focused())
    assert order == ["tab-chat", "new-chat", "log", "prompt", "SUMMARY", "send"]
    one(browser, "#tab-chat").send_keys(Keys.ARROW_RIGHT)
    assert focused() == "tab-needle"
    assert one(browser, "#panel-needle").is_displayed()
    one(browser, "#tab-needle").send_keys(Keys.ARROW_LEFT)
    assert one(browser, "#panel-chat").is_displayed()
    log = one(browser, "#log")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "polite")


@pytest.mark.slow
def test_a_key_is_asked_for_once(browser: Any, loaded: Loaded) -> None:
    with running(loaded, Rules(key="open sesame")) as r:
        browser.get(r.url)
        wait_for(lambda: one(browser, "#key-dialog").get_attribute("open") is not None)
        one(browser, "#key").send_keys("open sesame", "\ue007")
        wait_for(lambda: DEMO in text(browser, "#model"))
        browser.refresh()
        wait_for(lambda: DEMO in text(browser, "#model"))
