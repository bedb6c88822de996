"""A memory for each person over real websockets: kept when they leave, there when they return, and nobody else's."""

import asyncio
import contextlib
import dataclasses
import json
import os
import time

import pytest
import torch

from moshi_patch.serving.engine.policy import Policy
from moshi_patch.serving.memories.remember import Memories
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.writer import Writer
from moshi_patch.serving.web.limits import Limits
from moshi_patch.serving.web.tickets import Tickets
from tests.support.many import hear, receive, run, say, serve, talk
from tests.support.rows import load
from tests.support.servers import speech

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

GREEDY = "?text_temperature=0&audio_temperature=0"
TOKENS = {"Anna": "0123456789abcdefghijklmno", "Ben": "zyxwvutsrqponmlkjihgfedcb"}
POLICY = Policy(metadata_s=0.05, name_s=0.5, read_s=1.0)


@pytest.fixture
def tickets(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    path.chmod(0o600)
    return Tickets(path)


@pytest.fixture
def store(ttt_repo, tmp_path):
    return MemoryStore(tmp_path / "memories", load(ttt_repo, torch.float32)[1])


async def ticket(server, name: str) -> str:
    url = server.url.replace("/api/chat", "/api/ticket")
    async with server.session.post(url, headers={"Authorization": f"Bearer {TOKENS[name]}"}) as answer:
        return (await answer.json())["ticket"]


@contextlib.asynccontextmanager
async def connect(server, name: str):
    async with server.connect(f"{GREEDY}&metadata=1&ticket={await ticket(server, name)}") as socket:
        yield socket


async def learnt_so_far(socket) -> float:
    """The relative delta of the first layer, as the person is told it."""
    while (message := await receive(socket))[0] != 4:
        pass
    return json.loads(message[1:])["layers"][0]["relative_delta"]


async def visit(server, name: str) -> float:
    """Somebody comes, is told what they have learnt before, says a few words, and goes when all is heard."""
    async with connect(server, name) as socket:
        before = await learnt_so_far(socket)
        await say(socket, speech("boat", 24))
        person = next(person for person in server.front.sessions if person.name == name)
        while person.heard < 22:
            await asyncio.sleep(0.02)
    return before


async def is_written(server, name: str) -> None:
    """Once this person has left, and nothing of theirs is to be written any more."""
    engine = server.engine
    while any(person.name == name for person in engine._places.people) or engine.memories.busy(name):
        await asyncio.sleep(0.01)


def test_what_somebody_taught_is_there_when_they_return_and_for_nobody_else(ttt_repo, store, tickets):
    async def visits():
        async with serve(ttt_repo, policy=POLICY, memories=Memories(Writer(store)), tickets=tickets) as server:
            first = await visit(server, "Anna")
            again, other = await asyncio.gather(visit(server, "Anna"), visit(server, "Ben"))
            await is_written(server, "Anna")
        return first, again, other

    first, again, other = run(visits())
    assert first == other == 0 < again
    assert [(person.name, person.generations) for person in store.people()] == [("Anna", (1, 2)), ("Ben", (1,))]

    async def after_a_restart():
        async with serve(ttt_repo, policy=POLICY, memories=Memories(Writer(store)), tickets=tickets) as server:
            return await visit(server, "Anna")

    assert run(after_a_restart()) > again


def test_a_server_that_ends_writes_what_everybody_has_learnt(ttt_repo, store, tickets):
    async def conversations():
        memories = Memories(Writer(store))
        async with serve(ttt_repo, policy=POLICY, memories=memories, tickets=tickets) as server:  # noqa: SIM117
            async with connect(server, "Anna") as anna, connect(server, "Ben") as ben:
                for socket in (anna, ben):
                    await say(socket, speech("boat", 20))
                while server.engine.frames < 36:
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(server.engine.stop)
                return [(await hear(socket)).end for socket in (anna, ben)]

    assert run(conversations()) == [(1001, "the server is shut down")] * 2
    assert [person.name for person in store.people()] == ["Anna", "Ben"]


def test_what_somebody_learns_is_written_while_they_talk_and_a_killed_server_loses_only_what_came_after(
    ttt_repo, store, tickets
):
    policy = Policy(write_s=0.3)

    async def conversation():
        memories = Memories(Writer(store))
        async with serve(ttt_repo, policy=policy, memories=memories, tickets=tickets) as server:  # noqa: SIM117
            async with connect(server, "Anna") as socket:
                saying = asyncio.create_task(say(socket, speech("boat", 40), 0.05))
                while not (kept := await asyncio.to_thread(store.read, "Anna")).generation:
                    await asyncio.sleep(0.05)
                await saying
                return kept, server.engine.stats()

    kept, stats = run(conversation())
    (position,) = kept.memory["transformer.layers.1.gating.position"].tolist()
    assert 0 < position <= 40
    assert stats["since_last_write_s"] < 60


def test_somebody_who_asks_to_be_forgotten_has_nothing_in_the_store(ttt_repo, store, tickets):
    async def conversations():
        async with serve(ttt_repo, policy=POLICY, memories=Memories(Writer(store)), tickets=tickets) as server:
            await visit(server, "Anna")
            await is_written(server, "Anna")
            before = store.people()
            async with connect(server, "Anna") as socket:
                assert await learnt_so_far(socket) > 0
                await socket.send_bytes(b'\x04{"forget": true}')
                while await learnt_so_far(socket):
                    pass
                while server.engine.memories.busy("Anna"):
                    await asyncio.sleep(0.01)
                forgotten = store.people()
            await is_written(server, "Anna")
            left_at_once = store.people()
            assert await visit(server, "Anna") == 0
            await is_written(server, "Anna")
            return before, forgotten, left_at_once, store.people()

    before, forgotten, left_at_once, anew = run(conversations())
    assert [person.generations for person in before] == [(1,)]
    assert forgotten == left_at_once == []
    assert [person.generations for person in anew] == [(1,)]


def test_one_person_talks_once_and_a_page_that_is_reloaded_goes_on(ttt_repo, store, tickets):
    async def conversations():
        memories, limits = Memories(Writer(store)), Limits(per_person=2)
        async with serve(ttt_repo, policy=POLICY, memories=memories, tickets=tickets, limits=limits) as server:
            async with connect(server, "Anna") as socket:
                query = f"?ticket={await ticket(server, 'Anna')}"
                async with server.session.ws_connect(server.url + query) as second:
                    end = (await hear(second)).end
                query = f"?ticket={await ticket(server, 'Anna')}"
                async with server.session.ws_connect(server.url + query) as reloaded:
                    await asyncio.sleep(0.1)
                    await socket.close()
                    assert await receive(reloaded) == b"\x00"
            return end

    assert run(conversations()) == (1008, "you are talking here already, in another window")


def test_where_nobody_has_a_name_one_memory_is_kept_and_a_second_one_talks_without(ttt_repo, store):
    async def conversations():
        async with serve(ttt_repo, policy=POLICY, memories=Memories(Writer(store))) as server:
            await talk(server, query=GREEDY)
            async with server.connect(GREEDY + "&metadata=1") as socket:
                assert await learnt_so_far(socket) > 0
                async with server.connect(GREEDY + "&metadata=1") as guest:
                    assert await learnt_so_far(guest) == 0

    run(conversations())
    assert [person.name for person in store.people()] == ["local"]


@pytest.mark.parametrize("query", ["", "?ticket=", "?ticket=wrong", "?ticket={used}", "?ticket={old}"])
def test_who_has_no_ticket_does_not_come_in(ttt_repo, tickets, query):
    async def knock():
        async with serve(ttt_repo, rows=1, tickets=tickets) as server:
            used = await ticket(server, "Anna")
            async with server.connect(f"?ticket={used}"):
                pass
            tickets.seconds = -1.0
            old = await ticket(server, "Anna")
            async with server.session.ws_connect(server.url + query.format(used=used, old=old)) as socket:
                return (await hear(socket)).end

    assert run(knock()) == (1008, "ticket: is missing, wrong, used or too old; get one with your token")


class Silent(MemoryStore):
    """A store that does not answer who asks for Anna's memory, for longer than a server waits."""

    asked = False

    def read(self, person):
        if person == "Anna":
            self.asked = True
            time.sleep(6)
        return super().read(person)


def test_a_store_that_does_not_answer_sends_its_person_away_and_the_others_talk_on(ttt_repo, tickets, tmp_path):
    store = Silent(tmp_path / "memories", load(ttt_repo, torch.float32)[1])
    policy = dataclasses.replace(POLICY, read_s=4.0)

    async def turned_away(server):
        async with server.session.ws_connect(f"{server.url}?ticket={await ticket(server, 'Anna')}") as socket:
            return (await hear(socket)).end

    async def conversations():
        async with serve(ttt_repo, policy=policy, memories=Memories(Writer(store)), tickets=tickets) as server:
            async with connect(server, "Ben") as ben:
                anna = asyncio.create_task(turned_away(server))
                while not store.asked:
                    await asyncio.sleep(0.01)
                await say(ben, speech("boat", 24))
                await hear(ben, 12)
                waits = not anna.done()
                end = await anna
            return end, waits, server.engine.dropped_frames

    assert run(conversations()) == ((1011, "the store of memories does not answer"), True, 0)


@pytest.mark.parametrize("damage", ["cut", "other_model"])
def test_a_memory_that_cannot_be_used_sends_its_person_away_and_is_left_alone(
    ttt_repo, stock_repo, store, tickets, tmp_path, damage
):
    async def conversations(written):
        async with serve(ttt_repo, policy=POLICY, memories=Memories(Writer(written)), tickets=tickets) as server:
            query = f"?ticket={await ticket(server, 'Anna')}"
            async with server.session.ws_connect(server.url + query) as socket:
                return (await hear(socket)).end

    async def first():
        async with serve(ttt_repo, policy=POLICY, memories=Memories(Writer(store)), tickets=tickets) as server:
            await visit(server, "Anna")

    run(first())
    (path,) = [file for file in (tmp_path / "memories").rglob("*") if file.is_file()]
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 100)
    else:
        lm = load(ttt_repo, torch.float32)[1]
        next(iter(lm.parameters())).data.add_(1)
        store = MemoryStore(tmp_path / "memories", lm)
    content = path.read_bytes()
    assert run(conversations(store)) == (1011, "your memory cannot be read; the server's log says why")
    assert path.read_bytes() == content
