"""Who is taken out of the token file is sent away, with what they have taught kept; the others talk on."""

import asyncio
import os

import pytest
import torch

from moshi_patch.serving.memories.remember import Memories
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.writer import Writer
from moshi_patch.serving.web import front, tickets
from moshi_patch.serving.web.tickets import Tickets
from tests.support.many import hear, run, say, serve
from tests.support.rows import load
from tests.support.servers import speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

ANNA, BEN = "0123456789abcdefghijklmno", "zyxwvutsrqponmlkjihgfedcb"


def test_a_revoked_token_ends_its_conversation_and_no_other(ttt_repo, tmp_path, monkeypatch):
    monkeypatch.setattr(front, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(tickets, "LOOK_EVERY_S", 0.0)
    token_file = tmp_path / "tokens"
    token_file.write_text(f"anna {ANNA}\nben {BEN}\n")
    token_file.chmod(0o600)
    known = Tickets(token_file)
    store = MemoryStore(tmp_path / "memories", load(ttt_repo, torch.float32)[1])

    async def conversations():
        memories = Memories(Writer(store))
        async with serve(ttt_repo, memories=memories, tickets=known) as server:
            anna, ben = (server.connect(f"?ticket={known.issue(token)}") for token in (ANNA, BEN))
            async with anna as anna, ben as ben:
                for socket in (anna, ben):
                    await say(socket, speech("boat", 5))
                while server.engine.frames < 8:
                    await asyncio.sleep(0.02)
                token_file.write_text(f"ben {BEN}\n")
                os.utime(token_file, (1, 1))
                end = (await hear(anna)).end
                talks_on = [person.name for person in server.front.sessions] == ["ben"]
            return end, talks_on

    assert run(conversations()) == ((1008, "your token was taken back"), True)
    assert [person.name for person in store.people()] == ["anna", "ben"]
