"""Pictures of evaluation rows."""

from __future__ import annotations

from typing import Any

from kvfold.errors import MissingExtra


def _pyplot() -> Any:
    """matplotlib, drawing to files. Raises MissingExtra without it."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingExtra.of("--plot", "matplotlib", "plot") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def bars(rows: list[dict[str, Any]], path: str) -> None:
    """Plans of several profiles: what each term takes, in GiB, one bar per profile and one for 16 bits."""
    plt = _pyplot()
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
    """Needle recall, contexts by depths: one column per kind, stock cache above, folded cache below."""
    plt = _pyplot()
    kinds = sorted({r["kind"] for r in rows})
    contexts = sorted({r["context"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    figure, axes = plt.subplots(2, len(kinds), figsize=(3.2 * len(kinds), 5.2), squeeze=False, layout="constrained")
    image = None
    for j, kind in enumerate(kinds):
        for i, (field, label) in enumerate((("recall_reference", "16-bit cache"), ("recall", "folded cache"))):
            value = {(r["depth"], r["context"]): r[field] for r in rows if r["kind"] == kind}
            cells = [[value.get((d, c), float("nan")) for c in contexts] for d in depths]
            axis = axes[i][j]
            image = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_title(f"{kind}, {label}", fontsize=9)
            axis.set_xticks(
                range(len(contexts)), [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts], fontsize=8
            )
            axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
            for y, line in enumerate(cells):
                for x, v in enumerate(line):
                    axis.text(x, y, f"{v:.2f}", ha="center", va="center", fontsize=7)
    figure.supxlabel("context, tokens")
    figure.supylabel("depth of the needle")
    if image is not None:
        figure.colorbar(image, ax=axes, label="recall", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
