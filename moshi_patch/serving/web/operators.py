"""What those who run a server look at: `/metrics` for Prometheus and `/healthz` for what spreads people over servers.

Neither says a name, an address, or a word that was spoken.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

METRICS_PATH, HEALTH_PATH = "/metrics", "/healthz"

GAUGES = {
    "rows": ("moshi_rows", "People who can talk at the same time."),
    "people": ("moshi_people", "People who have a row."),
    "queue": ("moshi_queue", "People who wait for a row."),
    "draining": ("moshi_draining", "1 when nobody is let in any more."),
    "since_last_write_s": ("moshi_since_last_write_seconds", "Seconds since a memory was last written."),
    "oldest_unwritten_s": (
        "moshi_oldest_unwritten_seconds",
        "Seconds that a memory has waited for the store, at most.",
    ),
}
COUNTERS = {
    "steps": ("moshi_steps", "Steps of the model."),
    "frames": ("moshi_frames", "Frames of 80 ms that people said and were answered."),
    "late_frames": ("moshi_late_frames", "Frames that were answered later than a step after they had come."),
    "dropped_frames": ("moshi_dropped_frames", "Frames that nobody heard, as the model was slow."),
    "joined": ("moshi_joined", "People who have had a row."),
}
TICK = ("moshi_tick_seconds", "How long a tick took, of the latest ones.")
QUANTILES = {"p50": "0.5", "p99": "0.99"}

Stats = Callable[[], Mapping[str, Any]]
"""As :meth:`..engine.tick.Engine.stats`; numbers that are not known are None."""


class Figures:
    """A collector of prometheus-client: asks for the numbers when somebody looks."""

    def __init__(self, stats: Stats):
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        """All families of metrics. What is not known, as of a store that is not there, is left out."""
        numbers = self.stats()
        for key, (name, text) in GAUGES.items():
            if numbers.get(key) is not None:
                yield GaugeMetricFamily(name, text, value=float(numbers[key]))
        for key, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=numbers[key])
        ticks = GaugeMetricFamily(*TICK, labels=["quantile"])
        for key, quantile in QUANTILES.items():
            if numbers["tick_ms"][key] is not None:
                ticks.add_metric([quantile], numbers["tick_ms"][key] / 1000)
        yield ticks


def add_operator_routes(app: web.Application, stats: Stats) -> None:
    """Has `app`, which is not yet running, answer `GET /metrics` and `GET /healthz`."""
    registry = CollectorRegistry()
    registry.register(Figures(stats))
    ProcessCollector(registry=registry)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def health(request: web.Request) -> web.Response:
        numbers = stats()
        state = "failed" if numbers["failure"] else "draining" if numbers["draining"] else "ok"
        answer = {"state": state, **{key: numbers[key] for key in ("rows", "free", "queue")}}
        return web.json_response(answer, status=200 if state == "ok" else 503, headers={"Cache-Control": "no-store"})

    app.router.add_get(METRICS_PATH, metrics)
    app.router.add_get(HEALTH_PATH, health)
