"""Pictures of evaluation rows."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from kvfold.errors import MissingExtra

if TYPE_CHECKING:
    from torch import Tensor

SALT = "kvfold"  # of ids in SVG, so that equal pictures are equal bytes
LEAST = 1e-9  # nats: where the axis of the distribution begins


def pyplot(option: str = "--plot") -> Any:
    """matplotlib, drawing to files. Raises MissingExtra without it, which names the option that needs it."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingExtra.of(option, "matplotlib", "plot") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def bars(rows: list[dict[str, Any]], path: str) -> None:
    """Plans of several profiles: what each term takes, in GiB, one bar per profile and one for 16 bits."""
    plt = pyplot()
    terms = ("weights_bytes", "state_bytes", "workspace_bytes", "folded_bytes")
    first = rows[0]
    bars = [{**first, "profile": "16-bit", "folded_bytes": first["reference_bytes"]}, *rows]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(bars) + 1.6), layout="constrained")
    left = [0.0] * len(bars)
    for term in terms:
        width = [r[term] / 2**30 for r in bars]
        axis.barh([r["profile"] for r in bars], width, left=left, label=term.removesuffix("_bytes"))
        left = [a + b for a, b in zip(left, width, strict=True)]
    axis.axvline(first["memory_bytes"] / 2**30, color="black", linestyle=":", label="memory")
    axis.invert_yaxis()
    axis.set_xlabel("GiB")
    axis.set_title(f"{first['model']}, {first['context']:,} tokens, {first['sessions']} sessions")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def heat_maps(rows: list[dict[str, Any]], path: str) -> None:
    """Needle recall, contexts by depths: one column per kind; the stock cache above, below it every profile of the rows."""
    plt = pyplot()
    kinds = sorted({r["kind"] for r in rows})
    contexts = sorted({r["context"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    profiles = list(dict.fromkeys(r["profile"] for r in rows))
    lines = [(profiles[0], "recall_reference", "16-bit"), *((p, "recall", p) for p in profiles)]
    size = (3.2 * len(kinds), 2.6 * len(lines))
    figure, axes = plt.subplots(len(lines), len(kinds), figsize=size, squeeze=False, layout="constrained")
    image = None
    for j, kind in enumerate(kinds):
        for i, (profile, field, label) in enumerate(lines):
            value = {(r["depth"], r["context"]): r[field] for r in rows if (r["profile"], r["kind"]) == (profile, kind)}
            cells = [[value.get((d, c), float("nan")) for c in contexts] for d in depths]
            axis = axes[i][j]
            image = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_title(f"{kind}, {label}", fontsize=9)
            axis.set_xticks(
                range(len(contexts)), [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts], fontsize=8
            )
            axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
            for y, row in enumerate(cells):
                for x, v in enumerate(row):
                    axis.text(x, y, f"{v:.2f}", ha="center", va="center", fontsize=7)
    figure.supxlabel("context, tokens")
    figure.supylabel("depth of the needle")
    if image is not None:
        figure.colorbar(image, ax=axes, label="recall", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _svg(plt: Any, figure: Any) -> bytes:
    out = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": SALT}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()


def deciles(rows: dict[str, list[float]]) -> bytes:
    """SVG: mean KL (nats) by tenths of a window, a line per contender, on a logarithmic scale."""
    plt = pyplot("--report")
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name, values in rows.items():
        axis.plot(range(5, 100, 10), [max(v, LEAST) for v in values], marker="o", label=name)
    axis.set_yscale("log")
    axis.set_xlabel("position in the window, %")
    axis.set_ylabel("mean KL, nats")
    axis.legend(fontsize=8)
    return _svg(plt, figure)


def distribution(kl: dict[str, Tensor]) -> bytes:
    """SVG: share of positions whose KL [n] (nats) is above a value, a line per contender, both scales logarithmic."""
    plt = pyplot("--report")
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name, x in kl.items():
        values = x.clamp(min=LEAST).sort(descending=True).values
        # A thousand points are a line to the eye, and the largest are all there.
        at = sorted({*range(min(50, len(values))), *range(0, len(values), max(1, len(values) // 1000))})
        axis.plot([float(values[i]) for i in at], [(i + 1) / len(values) for i in at], label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("KL, nats")
    axis.set_ylabel("share of positions")
    axis.legend(fontsize=8)
    return _svg(plt, figure)
