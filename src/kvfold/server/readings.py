"""What a scrape reads off a model: memory by kind, sessions, requests, evictions, hits, fidelity."""

from __future__ import annotations

from collections.abc import Iterable

from kvfold.serving.model import Model

# (name, help, label name or empty, label value -> value)
Reading = tuple[str, str, str, dict[str, float]]
COUNTS = {
    "prefix_lookups": ("lookups", "Prompts looked up in the sessions."),
    "prefix_hits": ("hits", "Of them, prompts whose beginning was found."),
    "reused_tokens": ("reused_tokens", "Tokens that were found."),
    "sessions_written_out": ("written_out", "Sessions moved from memory to the disk."),
    "sessions_brought_back": ("brought_back", "Sessions read from the disk."),
    "sessions_dropped": ("dropped", "Sessions without a name that were forgotten."),
}
FIDELITY = {
    "samples": "Folded pages compared with their exact tokens.",
    "score_error": "Root mean square error of attention scores over folded pages, nats.",
    "output_error": "Root mean square error of attention over folded pages, relative.",
    "folded_mass": "Share of attention that falls on folded tokens.",
}


def gauges(model: Model) -> Iterable[Reading]:
    report = model.shelf.store.report()
    running = len(model.scheduler.jobs) - model.scheduler.waiting
    yield "kvfold_cache_bytes", "Memory of the sessions' caches.", "kind", dict(report["memory_bytes_by_kind"])
    yield "kvfold_cache_limit_bytes", "What they may take.", "", {"": report["memory_limit_bytes"]}
    promised = "What running requests may take beyond what they have."
    yield "kvfold_promised_bytes", promised, "", {"": report["promised_bytes"]}
    waiting = "What requests that wait need at most, each by itself."
    yield "kvfold_waiting_bytes", waiting, "", {"": model.scheduler.waiting_bytes}
    reference = report["memory_reference_bytes"]
    yield "kvfold_cache_reference_bytes", "What 16 bits per value would take.", "", {"": reference}
    counts = {"all": "sessions", "memory": "sessions_in_memory", "use": "sessions_in_use"}
    yield "kvfold_sessions", "Sessions.", "where", {k: report[name] for k, name in counts.items()}
    yield "kvfold_live_requests", "Requests.", "state", {"running": running, "waiting": model.scheduler.waiting}
    layers = model.runner.fidelity
    for name, text in FIDELITY.items():
        values = {str(x["layer"]): float(x[name]) for x in layers if name in x}
        yield f"kvfold_fidelity_{name}", text, "layer", values


def health(model: Model) -> dict[str, dict[str, int]]:
    """Requests and bytes, for who asks whether the server is well."""
    report, scheduler = model.shelf.store.report(), model.scheduler
    waiting = scheduler.waiting
    return {
        "requests": {"running": len(scheduler.jobs) - waiting, "waiting": waiting},
        "memory": {
            "limit_bytes": report["memory_limit_bytes"],
            "used_bytes": report["memory_bytes"],
            "promised_bytes": report["promised_bytes"],
            "waiting_bytes": scheduler.waiting_bytes,
        },
    }


def counters(model: Model) -> Iterable[Reading]:
    report = model.shelf.store.report()
    for name, (key, text) in COUNTS.items():
        yield f"kvfold_{name}", text, "", {"": report[key]}
