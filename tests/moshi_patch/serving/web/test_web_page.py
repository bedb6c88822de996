"""How the page is served, without a browser: its files, their types, and the policy that goes with each."""

import asyncio
import re

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from moshi_patch.serving.web.web_page import CONTENT_TYPES, FOLDER, add_page

FILES = sorted(path.name for path in FOLDER.iterdir())


def get(*paths: str) -> list[tuple[int, dict, bytes]]:
    async def client():
        app = web.Application()
        add_page(app)
        async with TestClient(TestServer(app)) as session:
            answers = [await session.get(path, allow_redirects=False) for path in paths]
            return [(answer.status, dict(answer.headers), await answer.read()) for answer in answers]

    return asyncio.run(client())


def test_every_file_is_served_with_its_type_under_a_strict_policy():
    answers = get("/", *[f"/page/{name}" for name in FILES])
    for (status, headers, body), name in zip(answers, ["index.html", *FILES], strict=True):
        assert status == 200
        assert body == (FOLDER / name).read_bytes()
        assert headers["Content-Type"] == f"{CONTENT_TYPES[name[name.rindex('.') :]]}; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[key] for key in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert {policy[key] for key in ("frame-ancestors", "base-uri", "form-action")} == {"'none'"}


@pytest.mark.parametrize(
    "path", ["/page/", "/page/nosuch.js", "/page/..%2Fweb_page.py", "/page/%2e%2e/web_page.py", "/index.html", "/page"]
)
def test_nothing_else_is_served(path):
    ((status, _, _),) = get(path)
    assert status == 404


def test_the_files_name_each_other_and_nobody_else():
    named = set()
    for name in FILES:
        text = (FOLDER / name).read_text()
        foreign = [
            address for address in re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text) if "www.w3.org" not in address
        ]
        assert not foreign, name
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|\beval\(|innerHTML", text), name
        named |= set(re.findall(r'["/]([\w.]+\.(?:js|css|svg))"', text))
    assert named == set(FILES) - {"index.html"}
