"""Prometheus metrics: counted as things happen, and read from the sessions when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvfold.server import readings
from kvfold.serving.job import Job
from kvfold.serving.model import Model
from kvfold.serving.scheduler import Meter

# From a step of a small model to minutes in a long prompt.
TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64)


class Metrics(Meter):
    """model: whose memory, sessions and fidelity a scrape reads."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.model: Model | None = None
        self._prompt = Counter("kvfold_prompt_tokens", "Prompt tokens of finished requests.", registry=r)
        self._cached = Counter("kvfold_cached_tokens", "Of them, tokens found in a cache.", registry=r)
        self._answer = Counter("kvfold_answer_tokens", "Tokens decoded.", registry=r)
        self._finished = Counter("kvfold_requests", "Requests that ended, by how.", ["finish"], registry=r)
        self._first = Histogram(
            "kvfold_first_token_seconds", "From request to first token.", buckets=REQUEST_SECONDS, registry=r
        )
        self._between = Histogram("kvfold_inter_token_seconds", "Between tokens.", buckets=TOKEN_SECONDS, registry=r)
        self._request = Histogram("kvfold_request_seconds", "Whole requests.", buckets=REQUEST_SECONDS, registry=r)
        self._step = Histogram("kvfold_decode_step_seconds", "Decode steps.", buckets=TOKEN_SECONDS, registry=r)
        self._call = Histogram("kvfold_prompt_call_seconds", "Calls over prompts.", buckets=TOKEN_SECONDS, registry=r)
        self._rows = Histogram("kvfold_decode_rows", "Answers decoded together in a step.", buckets=ROWS, registry=r)
        r.register(_Scraped(self))

    def read(self, tokens: int, seconds: float) -> None:
        self._call.observe(seconds)

    def decoded(self, rows: int, seconds: float) -> None:
        self._step.observe(seconds)
        self._rows.observe(rows)

    def picked(self, job: Job, seconds: float) -> None:
        self._answer.inc()
        (self._first if len(job.answer) == 1 else self._between).observe(seconds)

    def finished(self, job: Job) -> None:
        self._finished.labels(job.finish).inc()
        self._prompt.inc(len(job.prompt))
        self._cached.inc(job.cached_tokens)
        self._request.observe(job.latest - job.submitted)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Scraped(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        model = self._metrics.model
        if model is None:
            return
        for family, read in ((GaugeMetricFamily, readings.gauges), (CounterMetricFamily, readings.counters)):
            for name, text, label, values in read(model):
                metric = family(name, text, labels=[label] if label else [])
                for key, value in values.items():
                    metric.add_metric([key] if label else [], value)
                yield metric
