"""Moshi's own client of the command line talks to the server for many people, with a recording for a microphone."""

import argparse
import asyncio
import sys
import threading
import time
import types

import numpy as np
import pytest

from tests.support.many import STEPS, run, serve
from tests.support.servers import user_speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched_module")]


class FakeStream:
    """A sound card as `sounddevice` gives it: the microphone hears a recording, the loudspeaker's samples are kept."""

    played: list = []  # noqa: RUF012

    def __init__(self, callback, blocksize, **_):
        self.callback, self.blocksize, self.is_input = callback, blocksize, type(self) is FakeInput

    def __enter__(self):
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.going = True
        self.thread.start()

    def __exit__(self, *_):
        self.going = False
        self.thread.join()

    def run(self):
        for frame in user_speech("boat", STEPS + 15).reshape(-1, self.blocksize, 1):
            if not self.going:
                break
            block = frame.copy() if self.is_input else np.zeros_like(frame)
            self.callback(block, self.blocksize, None, None)
            if not self.is_input:
                self.played.append(block)
            time.sleep(0.04)


class FakeInput(FakeStream):
    pass


def test_moshis_own_python_client_talks_to_it_unchanged(ttt_repo, monkeypatch):
    fake = types.SimpleNamespace(InputStream=FakeInput, OutputStream=FakeStream)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    import moshi.client

    lines, tokens = [], []
    printer = types.SimpleNamespace(
        log=lambda level, text: lines.append((level, text)),
        print_token=tokens.append,
        print_header=lambda: None,
        print_pending=lambda: None,
        print_lag=lambda: None,
    )
    FakeStream.played = []

    async def converse():
        async with serve(ttt_repo) as server:
            url = server.url.replace("http:", "ws:").removesuffix("/api/chat")
            client = asyncio.create_task(moshi.client.run(printer, argparse.Namespace(url=url)))
            while len(tokens) < 5 or not FakeStream.played or np.abs(np.concatenate(FakeStream.played)).max() < 0.01:
                await asyncio.sleep(0.05)
            errors = [line for line in lines if line[0] == "error"]
        await client  # the server has ended the conversation, of which it may complain
        return errors

    assert run(converse()) == []
    assert ("warning", "unknown message kind 0") in lines  # the handshake, which it does not know either
