"""Shared by the tests of the page: a real Chromium, without a window, whose microphone plays a file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import sphn

from example.make_speech import write_wav
from tests.support.tiny_repository import DATA
from tests.support.tools import find_chromium

WAIT_MS = 60_000
DELTA = "parseFloat(document.querySelector('#layers b')?.textContent)"
"""What the page shows of the first layer's memory; NaN before anything."""

INSECURE_NAME = "moshi.test"
"""A name that leads to this machine, and that is not `localhost` to a browser."""


def write_microphone(path: Path, name: str = "boat") -> Path:
    """What the user says in a dialogue, as a file that the browser's microphone plays over and over."""
    write_wav(path, sphn.read(str(DATA / f"{name}.wav"))[0][1:])
    return path


@contextlib.contextmanager
def chromium(microphone: Path) -> Iterator:
    """A playwright `Browser`, until the end of the block."""
    from playwright.sync_api import sync_playwright

    arguments = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
        "--autoplay-policy=user-gesture-required",
        f"--host-resolver-rules=MAP {INSECURE_NAME} 127.0.0.1",
        "--disable-gpu",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def open_page(context, url: str, clock: bool = False):
    """A tab with the page. `clock`: whether its time can be put forward."""
    page = context.new_page()
    if clock:
        page.clock.install()
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    wait_for(page, "document.getElementById('status').textContent")
    return page


def talk(page) -> None:
    """Presses the button, and waits until the server has given the conversation its place."""
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.body.dataset.phase === 'talking'")


def wait_for(page, condition: str) -> None:
    """Until `condition`, in the page's script, is true."""
    page.wait_for_function(f"() => {condition}", timeout=WAIT_MS, polling=20)


def shown(page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def heard_level(page) -> int:
    return int(page.locator("#heard").get_attribute("aria-valuenow"))
