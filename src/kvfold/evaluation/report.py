"""One self-contained HTML file about one evaluation: figures, pictures, the worst positions with their text, provenance."""

from __future__ import annotations

import base64
import json
import platform
import unicodedata
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from kvfold.config import CacheSpec
from kvfold.errors import EvaluationError, MissingExtra
from kvfold.evaluation import plots
from kvfold.evaluation.contenders import Folded
from kvfold.evaluation.divergence import CALL_TOKENS, Scores
from kvfold.rotation.reference import signs, stream

FILE = "report.html"
WORST = 12  # positions shown
BEFORE = 40  # tokens of text before each
PACKAGES = ("kvfold", "torch", "transformers", "numpy", "optimum-quanto", "hqq")
Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """scores and figures by contender, the folded cache first; windows of token ids, and the tokenizer that made them;
    facts: where the numbers come from, by heading."""

    title: str
    scores: dict[str, Scores]
    figures: dict[str, dict[str, Any]]
    windows: list[list[int]]
    tokenizer: Any
    facts: Facts


def prepare(folder: Path) -> None:
    """Make `folder` and see that a report can be written, before minutes are spent on its numbers.

    Raises MissingExtra without jinja2 or matplotlib, EvaluationError if there can be no such folder.
    """
    _jinja()
    plots.pyplot("--report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{folder} cannot be made ({error})", "Name another folder for --report") from error


def write(report: Report, folder: Path) -> Path:
    """Write FILE into `folder` and return its path. Raises EvaluationError if that fails."""
    page = render(report)
    try:
        (folder / FILE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{folder} cannot be written ({error})", "Name another folder for --report") from error
    return folder / FILE


def _jinja() -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtra.of("--report", "jinja2", "plot") from error
    return jinja2


def render(report: Report) -> str:
    """The page. All text in it is escaped; pictures are data addresses, and nothing is asked of any network."""
    jinja = _jinja()
    loader = jinja.PackageLoader("kvfold.evaluation", "data")
    environment = jinja.Environment(loader=loader, autoescape=True, undefined=jinja.StrictUndefined)
    environment.filters |= {"number": _number, "tojson": json.dumps}
    own = next(iter(report.scores))
    page: str = environment.get_template("report.html.jinja").render(
        title=report.title,
        call_tokens=CALL_TOKENS,
        figures=report.figures,
        keys=[k for k, v in report.figures[own].items() if isinstance(v, int | float)],
        deciles=_address(plots.deciles({n: f["kld_by_decile"] for n, f in report.figures.items()})),
        distribution=_address(plots.distribution({n: s.kl for n, s in report.scores.items()})),
        own=own,
        worst=worst_positions(report.scores[own], report.windows, report.tokenizer),
        facts=report.facts,
    )
    return page


def worst_positions(scores: Scores, windows: list[list[int]], tokenizer: Any) -> list[dict[str, Any]]:
    """The WORST positions by KL, largest first, with the text that leads to them and what was expected next."""
    rows = []
    for at in scores.kl.argsort(descending=True)[:WORST].tolist():
        window, position = 0, at
        while position >= len(windows[window]):
            position -= len(windows[window])
            window += 1
        ids = windows[window]
        rows.append(
            {
                "kl": float(scores.kl[at]),
                "window": window,
                "position": position,
                "before": visible(tokenizer.decode(ids[max(0, position + 1 - BEFORE) : position + 1])),
                "following": visible(tokenizer.decode(ids[position + 1 : position + 2])),
                "reference": visible(tokenizer.decode([int(scores.top_reference[at])])),
                "folded": visible(tokenizer.decode([int(scores.top[at])])),
            }
        )
    return rows


def provenance(model: Any, spec: CacheSpec, hashes: dict[str, Any], protocol: dict[str, Any]) -> Facts:
    """Facts of a report. hashes: digests of the model, by name; protocol: what was read, as the caller knows it."""
    kept = {p: metadata.version(p) for p in PACKAGES if _installed(p)}
    return {
        "Profile": {k: json.dumps(v) for k, v in asdict(spec).items()},
        "Rotation": {"seed": spec.seed, "fingerprint": rotation_fingerprint(model.config, spec)},
        "Model": {"class": type(model).__name__, "dtype": str(model.dtype), "device": str(model.device), **hashes},
        "Text": protocol,
        "Software": {**kept, "python": platform.python_version(), "machine": platform.machine()},
    }


def rotation_fingerprint(config: Any, spec: CacheSpec) -> str:
    """SHA-256 of the random signs of every folded layer, KV head and side: equal where a seed gives equal rotations."""
    text = config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    out = sha256(f"{spec.key.rotation} {spec.value.rotation} {dim}".encode())
    for layer in Folded("folded", config, spec).start().folded_layers:
        for head in range(text.num_key_value_heads):
            for side in (0, 1):
                out.update(signs(dim, stream(spec.seed, layer.folded.layer, head, side)).astype("int8").tobytes())
    return out.hexdigest()


def visible(text: str) -> str:
    """Text whose line ends and controls can be seen, and do nothing."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in shown)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _address(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
