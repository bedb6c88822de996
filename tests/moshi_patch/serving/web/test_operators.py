"""What operators see: the figures of a server as Prometheus reads them, and whether it takes more people."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from moshi_patch.serving.web.operators import add_operator_routes

STATS = {
    "rows": 8,
    "people": 3,
    "free": 5,
    "queue": 2,
    "tick_ms": {"p50": 20.5, "p99": 61.25},
    "late_frames": 4,
    "dropped_frames": 1,
    "steps": 1000,
    "frames": 2500,
    "joined": 17,
    "oldest_unwritten_s": 0.0,
    "since_last_write_s": 42.5,
    "draining": False,
    "failure": None,
}


def ask(stats: dict, *paths: str) -> list[tuple[int, str]]:
    async def client():
        app = web.Application()
        add_operator_routes(app, lambda: stats)
        async with TestClient(TestServer(app)) as session:
            answers = [await session.get(path) for path in paths]
            return [(answer.status, await answer.text()) for answer in answers]

    return asyncio.run(client())


def samples(text: str) -> dict[str, float]:
    """As Prometheus reads them, by name and quantile."""
    return {
        sample.name + sample.labels.get("quantile", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_figures_are_those_of_the_server():
    ((status, text),) = ask(STATS, "/metrics")
    assert status == 200
    found = samples(text)
    expected = {
        "moshi_rows": 8,
        "moshi_people": 3,
        "moshi_queue": 2,
        "moshi_draining": 0,
        "moshi_tick_seconds0.5": 0.0205,
        "moshi_tick_seconds0.99": 0.06125,
        "moshi_late_frames_total": 4,
        "moshi_dropped_frames_total": 1,
        "moshi_steps_total": 1000,
        "moshi_frames_total": 2500,
        "moshi_joined_total": 17,
        "moshi_since_last_write_seconds": 42.5,
        "moshi_oldest_unwritten_seconds": 0,
    }
    assert {name: found[name] for name in expected} == expected


def test_what_is_not_known_is_left_out():
    nothing = {"tick_ms": {"p50": None, "p99": None}, "oldest_unwritten_s": None, "since_last_write_s": None}
    ((status, text),) = ask(STATS | nothing, "/metrics")
    assert status == 200
    assert not [name for name in samples(text) if "write" in name or "tick" in name]


@pytest.mark.parametrize(
    ("change", "status", "state"),
    [
        ({}, 200, "ok"),
        ({"free": 0}, 200, "ok"),
        ({"draining": True}, 503, "draining"),
        ({"failure": "x"}, 503, "failed"),
    ],
)
def test_health_says_whether_more_people_may_come(change, status, state):
    ((found, text),) = ask(STATS | change, "/healthz")
    assert found == status
    assert f'"state": "{state}"' in text
    assert f'"free": {change.get("free", 5)}' in text
