"""Pictures of evaluation rows."""

from __future__ import annotations

from typing import Any

from kvfold.errors import MissingExtra


def heat_maps(rows: list[dict[str, Any]], path: str) -> None:
    """Needle recall, contexts by depths: one column per kind, stock cache above, folded cache below."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingExtra.of("--plot", "matplotlib", "plot") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

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
