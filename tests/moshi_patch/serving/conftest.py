"""Shared by the tests of servers and stores: the patch for as long as one runs here, what is said, one for many."""

import uuid

import pytest

import moshi_patch
from moshi_patch.serving.engine.policy import Policy
from tests.support.browsers import chromium, write_microphone
from tests.support.fake_chat import fake_chat
from tests.support.many import SharedServer
from tests.support.servers import IDLE_S, serve_here, speech


@pytest.fixture(scope="module")
def patched_module():
    """moshi with the patch installed, stock again after the module."""
    moshi_patch.install()
    yield
    moshi_patch.uninstall()


@pytest.fixture(scope="module")
def server(patched_module, ttt_repo):
    """One server for all the clients of a module, one after the other. It writes down every reset and step."""
    with serve_here(["--idle-timeout", str(IDLE_S)], ttt_repo) as server:
        yield server


@pytest.fixture(scope="session")
def said() -> list[bytes]:
    return speech()


@pytest.fixture(scope="module")
def usual(server, said):
    """The answer to the speech before anything bad has happened."""
    return server.talk(said)


@pytest.fixture(scope="module")
def many(patched_module, ttt_repo):
    """A server of three rows for all tests of a module, in a thread of its own."""
    server = SharedServer(ttt_repo, rows=3, policy=Policy(metadata_s=0.1, idle_s=3.0))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One Chromium for the tests of a module. No longer: while it is there, no other event loop runs in its thread."""
    with chromium(write_microphone(tmp_path_factory.mktemp("microphone") / "boat.wav")) as browser:
        yield browser


@pytest.fixture(scope="session")
def only_fake_chat():
    with fake_chat() as chat:
        yield chat


@pytest.fixture
def chat(only_fake_chat):
    """A server of the chat's protocol without a model, as new."""
    only_fake_chat.reset()
    return only_fake_chat


@pytest.fixture(params=["folder", "memory"])
def url(request, tmp_path) -> str:
    """Of a store that is empty: a folder, and what `fsspec` has for a service."""
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/people"
