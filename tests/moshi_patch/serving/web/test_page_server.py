"""The page in a real Chromium against the real server: speech goes in, text and sound come out, the memory stays."""

import pytest
import torch

from moshi_patch.serving.engine.policy import Policy
from moshi_patch.serving.memories.remember import Memories
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.writer import Writer
from moshi_patch.serving.web.tickets import Tickets
from tests.support.browsers import DELTA, open_page, shown, talk, wait_for
from tests.support.many import SharedServer
from tests.support.rows import load
from tests.support.tools import needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]

TOKENS = {name: f"{name}-0123456789-abcdefgh" for name in ("anna", "ben", "carl")}


@pytest.fixture(scope="module")
def people(patched_module, ttt_repo, tmp_path_factory):
    """A server with two rows whose people have names and a memory; gives its address."""
    folder = tmp_path_factory.mktemp("people")
    (folder / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    (folder / "tokens").chmod(0o600)
    memories = Memories(Writer(MemoryStore(folder / "memory", load(ttt_repo, torch.float32)[1])))
    policy = Policy(metadata_s=0.25, queue=1)
    server = SharedServer(ttt_repo, rows=2, policy=policy, memories=memories, tickets=Tickets(folder / "tokens"))
    yield server.server.url.removesuffix("api/chat")
    server.stop()


@pytest.fixture
def tab(browser, people):
    """Opens a tab of a browser of its own, and talks there as somebody."""
    contexts = []

    def enter(name: str, talks: bool = True):
        contexts.append(browser.new_context())
        page = open_page(contexts[-1], people)
        page.get_by_role("button", name="Start talking").click()
        wait_for(page, "document.activeElement.id === 'token'")
        page.get_by_label("Your token").fill(TOKENS[name])
        page.keyboard.press("Enter")
        if talks:
            wait_for(page, "document.body.dataset.phase === 'talking'")
        return page

    yield enter
    for context in contexts:
        context.close()


def test_what_is_said_is_learnt_and_a_reload_finds_it_again(tab):
    page = tab("anna")
    page.evaluate("window.most = 0; setInterval(() => { most = Math.max(most, said.ariaValueNow) }, 20)")
    wait_for(page, f"{DELTA} === 0")  # somebody new
    wait_for(page, "document.getElementById('text').textContent.length > 10")
    wait_for(page, "window.most > 0")
    wait_for(page, f"{DELTA} > 0")  # a chunk has been heard
    assert page.locator("#layers h3").all_inner_texts() == ["Layer 1", "Layer 3"]
    assert "A step takes" in shown(page, "memory-summary")
    page.get_by_role("button", name="Learn from me").click()
    wait_for(page, "document.getElementById('memory-summary').textContent.includes('is held')")
    page.wait_for_timeout(1600)  # what was learnt last is folded in over a chunk
    kept = page.evaluate(DELTA)
    page.reload()
    assert first_delta(page) == pytest.approx(kept, rel=0.2)  # the tab still knows who it is
    page.get_by_role("button", name="Forget me").click()
    page.get_by_role("dialog").get_by_role("button", name="Forget me").click()
    wait_for(page, f"{DELTA} === 0")
    page.reload()
    assert first_delta(page) < kept / 2  # nothing from before came back


def first_delta(page) -> float:
    """Starts to talk; the first that the page shows of the memory then, before much new is learnt."""
    seen = "if (window.first === undefined && document.querySelector('#layers b')) window.first = " + DELTA
    page.evaluate(f"new MutationObserver(() => {{ {seen} }}).observe(layers, {{ childList: true, subtree: true }})")
    talk(page)
    wait_for(page, "window.first >= 0")
    return page.evaluate("window.first")


def test_two_tabs_talk_at_once_and_a_third_one_waits_until_one_ends(tab):
    anna, ben = tab("anna"), tab("ben")
    for page in (anna, ben):
        wait_for(page, "document.getElementById('text').textContent.length > 5")
        wait_for(page, f"{DELTA} > 0")
    carl = tab("carl", talks=False)
    wait_for(carl, "document.getElementById('status').textContent.includes('number 1 in the queue')")
    anna.get_by_role("button", name="Stop").click()
    wait_for(carl, "document.body.dataset.phase === 'talking'")
    assert ben.evaluate("document.body.dataset.phase") == "talking"


def test_who_comes_when_all_is_full_is_told_so(tab):
    tab("anna")
    tab("ben")
    carl = tab("carl", talks=False)
    wait_for(carl, "document.getElementById('status').textContent.includes('number 1 in the queue')")
    late = tab("carl", talks=False)
    wait_for(late, "document.getElementById('problem').textContent.includes('The server is full')")
    assert late.get_by_role("button", name="Start talking").is_enabled()


def test_the_same_person_in_a_second_window_is_told_that_they_talk_already(tab):
    tab("anna")
    other = tab("anna", talks=False)
    wait_for(other, "document.getElementById('problem').textContent")
    assert "talk" in shown(other, "problem")
