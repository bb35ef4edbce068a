"""The report of an evaluation: one file that asks nothing of any network, with the numbers of --json and its text escaped."""

from __future__ import annotations

import base64
import json
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from transformers import AutoConfig

from kvfold import CacheSpec
from kvfold.cli.main import main
from kvfold.errors import EvaluationError, MissingExtra
from kvfold.evaluation.report import WORST, rotation_fingerprint, visible
from kvfold.loading import demo_folder

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'here' </code></td> <img src=x onerror=alert(2)> http://example.org/ "


class Page(HTMLParser):
    """Checks that what is opened is closed; keeps cells of figures, rows of the worst, sources and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.figures: dict[tuple[str, str], object] = {}
        self.text = ""
        self.worst: list[list[str]] = []
        self.within = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if "data-figure" in given:
            self.figures[given["data-of"], given["data-figure"]] = json.loads(given["data-value"])
        if tag == "table":
            self.within = given.get("id", "")
        if tag == "tr" and self.within == "worst":
            self.worst.append([])
        if tag == "td" and self.within == "worst":
            self.worst[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.within == "worst" and "td" in self.open:
            self.worst[-1][-1] += data


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["eval", "demo", "--windows", "2", "--window-tokens", "256", "--profile", "extreme", "--json", *arguments])
    return left.value.code or 0, json.loads(capsys.readouterr().out)


@pytest.fixture
def hostile(tmp_path):
    path = tmp_path / "hostile.txt"
    path.write_text(HOSTILE * 60, encoding="utf-8")
    return path


def test_report_is_whole_and_says_what_json_says(capsys, tmp_path, hostile):
    folder = tmp_path / "new" / "folder"
    arguments = ("--text", str(hostile), "--baseline", "kivi-2", "--report", str(folder))
    code, result = run(capsys, *arguments)
    assert code == 0
    assert [f.name for f in folder.iterdir()] == ["report.html"]
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    for name, figures in (("extreme", result), ("kivi-2", result["baselines"][0])):
        shown = {key: value for (of, key), value in page.figures.items() if of == name}
        assert shown == {k: v for k, v in figures.items() if isinstance(v, int | float)}
    # Nothing of the text is markup, nothing is loaded from elsewhere, nothing runs.
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert "<script>alert(1)" in "".join("".join(r) for r in page.worst)
    assert page.tags.count("img") == 2
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith("data:image/svg+xml;base64,")
        if name == "src":
            assert ElementTree.fromstring(base64.b64decode(value.partition(",")[2])).tag.endswith("}svg")
    rows = page.worst[1:]
    assert len(rows) == WORST
    assert (int(rows[0][1]), int(rows[0][2])) == (result["kld_max_window"], result["kld_max_position"])
    assert float(rows[0][0]) == pytest.approx(result["kld_max"], rel=1e-4)
    assert "http" in page.text  # the text's own, as text
    for said in ("fingerprint", "torch", "seed", "full", "sha256", "window tokens"):
        assert said in page.text
    before = source
    run(capsys, *arguments)
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_the_rotation_fingerprint_knows_seed_and_model():
    config = AutoConfig.from_pretrained(demo_folder())
    first = rotation_fingerprint(config, CacheSpec())
    assert first == rotation_fingerprint(config, CacheSpec(window=0))
    assert first != rotation_fingerprint(config, CacheSpec(seed=2))
    config.num_key_value_heads += 1
    assert first != rotation_fingerprint(config, CacheSpec())


def test_controls_are_made_visible():
    assert visible("a\n\tb\x00\u202ec\x1b") == "a⏎⇥b\ufffd\ufffdc\ufffd"


def test_what_cannot_be_written_is_told(capsys, tmp_path, monkeypatch):
    occupied = tmp_path / "file"
    occupied.write_text("")
    code, result = run(capsys, "--report", str(occupied))
    assert (code, result["error"]["kind"]) == (1, EvaluationError.__name__)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, result = run(capsys, "--report", str(tmp_path / "other"))
    assert (code, result["error"]["kind"]) == (1, MissingExtra.__name__)
    assert "kvfold[plot]" in result["error"]["cure"]
