"""The page in a real Chromium, whose microphone plays a spoken file, against a server that says back what it hears."""

import time

import numpy as np
import pytest

from moshi_patch.serving.web.web_page import FOLDER
from tests.support.browsers import INSECURE_NAME, WAIT_MS, heard_level, open_page, shown, talk, wait_for
from tests.support.fake_chat import RATE, TICKET, TOKEN
from tests.support.tools import needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture
def context(browser):
    with browser.new_context() as context:
        yield context


@pytest.fixture
def page(context, chat):
    return open_page(context, chat.url)


def test_what_is_spoken_is_heard_and_what_is_said_is_shown_and_sounds(page, chat):
    talk(page)
    wait_for(page, "document.getElementById('text').textContent.includes('my boat is Nimbus.')")
    page.evaluate("window.most = 0; setInterval(() => { most = Math.max(most, said.ariaValueNow) }, 20)")
    wait_for(page, "window.most > 20")
    assert shown(page, "memory-summary") == "The memory is learning. A step takes 12 of 80 ms."
    assert page.locator("#layers h3").all_inner_texts() == ["Layer 5", "Layer 11"]
    before = page.locator("#layers b").all_inner_texts()
    wait_for(page, f"document.querySelector('#layers b').textContent !== '{before[0]}'")
    assert page.locator("[data-part=known-row]:visible").count() == 1  # one layer's kind of update knows it
    page.wait_for_timeout(2000)  # into the next words
    (connection,) = chat.connections
    assert connection.query == {"metadata": "1", "ticket": TICKET}
    heard = loudness(np.concatenate(connection.pcm))
    assert (heard > 0.03).sum() >= 5, heard  # words, through the browser's own gain and filters
    assert longest_pause(heard) >= 8, heard  # the file has one of 1.6 s; a browser without a file beeps twice a second


def loudness(pcm: np.ndarray) -> np.ndarray:
    """Per 100 ms."""
    pieces = pcm[: len(pcm) // (RATE // 10) * (RATE // 10)].reshape(-1, RATE // 10)
    return np.sqrt((pieces**2).mean(-1))


def longest_pause(loudness: np.ndarray) -> int:
    """The longest run of pieces without sound, between sounds."""
    loud = np.flatnonzero(loudness > 0.005)
    return int(np.diff(loud).max()) - 1


def test_a_model_without_memory_is_said_to_have_none(page, chat):
    chat.layers = ()
    talk(page)
    wait_for(
        page, "document.getElementById('memory-summary').textContent.startsWith('This model has no memory. A step')"
    )
    assert page.locator("#layers li").count() == 0


def test_it_says_how_a_conversation_ended(page, chat):
    talk(page)
    endings = {
        (1011, "the model's numbers are not finite any more"): "The server had an error (the model's numbers are not"
        " finite any more).",
        (1013, ""): "The server is full: please try again later.",
        (1007, "the audio is not Opus in Ogg."): "The server could not read the sound (the audio is not Opus in Ogg).",
        (1008, "no audio for 30 s"): "The server ended the conversation (no audio for 30 s).",
        (1001, ""): "The server was shut down.",
    }
    for number, ((code, reason), sentence) in enumerate(endings.items()):
        if number:
            talk(page)
        chat.hang_up(code, reason)
        wait_for(page, "document.body.dataset.phase === 'idle'")
        assert shown(page, "problem") == sentence
        assert page.get_by_role("button", name="Start talking").is_enabled()


def test_the_place_in_the_queue_is_told(page, chat):
    chat.place = 2
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.getElementById('status').textContent.includes('number 2 in the queue')")
    assert chat.connections[0].pcm == []
    chat.place = None
    wait_for(page, "document.body.dataset.phase === 'talking'")


def test_a_full_server_is_said_to_be_full(page, chat):
    chat.close = (1013, "8 people talk")
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.body.dataset.phase === 'idle'")
    assert shown(page, "problem") == "The server is full: please try again later (8 people talk)."


@pytest.mark.parametrize("cut", [True, False], ids=["killed", "restarted"])
def test_a_lost_server_is_looked_for_again(cut, page, chat):
    talk(page)
    page.get_by_role("button", name="Learn from me").click()
    chat.hang_up(1012, "the server is restarted", cut=cut)
    wait_for(page, "document.body.dataset.phase === 'starting'")
    wait_for(page, "document.body.dataset.phase === 'talking'")
    deadline = time.monotonic() + WAIT_MS / 1000
    while not (len(chat.connections) == 2 and chat.connections[1].wishes) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert chat.connections[1].wishes == [{"updates": False}]  # as the person had it


def test_a_server_that_says_nothing_any_more_is_lost(context, chat):
    page = open_page(context, chat.url, clock=True)
    talk(page)
    wait_for(page, "document.querySelector('#layers b')")
    chat.is_silent = True
    page.clock.fast_forward(9000)
    page.wait_for_timeout(300)
    assert page.evaluate("document.body.dataset.phase") == "talking"
    page.evaluate(
        "window.phases = new Set(); const body = document.body;"
        "new MutationObserver(() => phases.add(body.dataset.phase)).observe(body, { attributes: true })"
    )
    page.clock.fast_forward(12_000)
    wait_for(page, "window.phases.has('starting')")
    chat.is_silent = False
    wait_for(page, "window.phases.has('talking')")
    assert len(chat.connections) == 2


def test_the_buttons_tell_the_server_what_is_wished(page, chat):
    updates, forget = page.get_by_role("button", name="Learn from me"), page.get_by_role("button", name="Forget me")
    assert updates.is_disabled()
    assert forget.is_disabled()
    talk(page)
    for expected in ("false", "true"):
        updates.click()
        assert updates.get_attribute("aria-pressed") == expected
        sentence = "is learning" if expected == "true" else "is held"
        wait_for(page, f"document.getElementById('memory-summary').textContent.includes('{sentence}')")
    forget.click()
    page.get_by_role("button", name="Keep it").click()
    assert chat.connections[0].wishes == [{"updates": False}, {"updates": True}]
    forget.click()
    page.get_by_role("dialog").get_by_role("button", name="Forget me").click()
    wait_for(page, "document.getElementById('status').textContent === 'What you said was forgotten.'")
    page.wait_for_timeout(300)
    assert chat.connections[0].wishes[2:] == [{"forget": True}]
    forget.click()
    page.keyboard.press("Escape")  # which is no second yes
    page.wait_for_timeout(300)
    assert len(chat.connections[0].wishes) == 3
    page.get_by_role("button", name="Stop").click()
    assert page.evaluate("said.ariaValueNow") == "0"
    assert heard_level(page) == 0


def test_a_token_is_asked_for_and_kept_in_this_tab_alone(context, page, chat):
    chat.asks_token = True
    addresses = []
    context.on("request", lambda request: addresses.append(request.url))
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.activeElement.id === 'token'")
    assert shown(page, "problem") == "This server asks for a token."
    unknown = "The server does not know this token."
    for token, problem in [("wrong", unknown), ("wrong too, ☃", unknown), (TOKEN, "")]:
        page.get_by_label("Your token").fill(token)
        page.keyboard.press("Enter")
        end = "idle" if problem else "talking"
        wait_for(page, f"document.body.dataset.phase === '{end}'")
        wait_for(page, f"document.getElementById('problem').textContent === '{problem}'")
    assert page.evaluate("Object.values(sessionStorage)") == [TOKEN]
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert not [address for address in addresses if "secret" in address]
    assert "secret" not in page.evaluate("document.documentElement.outerHTML")
    page.reload()
    talk(page)  # the same person, not asked again
    page.get_by_role("button", name="New person").click()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.get_by_label("Your token").is_visible()
    other = open_page(context, chat.url)
    other.get_by_role("button", name="Start talking").click()
    wait_for(other, "document.activeElement.id === 'token'")


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((429, {"Retry-After": "7"}), "You tried too often: please wait 7 seconds."),
        ((503, {}), "The server is about to stop: please try again in a moment."),
        ((403, {}), 'The server refused (403: {"error": "no"}).'),
    ],
)
def test_a_refused_ticket_is_told_with_its_reason(refusal, sentence, page, chat):
    chat.refusal = refusal
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.getElementById('problem').textContent")
    assert shown(page, "problem") == sentence
    assert page.evaluate("document.body.dataset.phase") == "idle"


def test_where_nobody_has_a_name_a_new_person_is_told_so(page, chat):
    chat.refusal = (404, {})
    talk(page)
    assert "ticket" not in chat.connections[0].query
    page.get_by_role("button", name="New person").click()
    assert shown(page, "status").startswith("This server knows no names")


def test_a_server_that_is_gone_does_not_answer(page, chat):
    page.route("**/api/ticket", lambda route: route.abort())
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.getElementById('problem').textContent")
    assert shown(page, "problem") == "The server does not answer."
    assert page.evaluate("document.body.dataset.phase") == "idle"
    assert chat.connections == []


def test_two_tabs_talk_at_once(context, page, chat):
    other = open_page(context, chat.url)
    for tab in (page, other):
        talk(tab)
    for tab in (page, other):
        wait_for(tab, "document.getElementById('text').textContent.includes('Nimbus')")
    assert len(chat.connections) == 2
    assert all(sum(map(len, connection.pcm)) > RATE for connection in chat.connections)


def test_without_https_it_says_why_there_is_no_microphone(context, chat):
    page = open_page(context, f"http://{INSECURE_NAME}:{chat.port}/")
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.getElementById('problem').textContent")
    assert "only over HTTPS" in shown(page, "problem")
    assert chat.connections == []


REFUSED = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('x', '%s') }"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            REFUSED % "NotAllowedError",
            "allow",
        ),
        (REFUSED % "NotFoundError", "has no"),
        (REFUSED % "AbortError", "used: x"),
        ("delete window.AudioEncoder", "cannot record Opus"),
    ],
    ids=["refused", "none", "other", "old browser"],
)
def test_it_says_why_there_is_no_microphone(spoil, reason, page, chat):
    page.evaluate(f"void ({spoil})")
    page.get_by_role("button", name="Start talking").click()
    wait_for(page, "document.getElementById('problem').textContent")
    assert reason in shown(page, "problem")
    assert page.evaluate("document.body.dataset.phase") == "idle"
    assert chat.connections == []


def test_stop_while_it_starts_leaves_nothing_open(page, chat):
    chat.place = 1
    for _ in range(3):
        page.get_by_role("button", name="Start talking").click()
        page.get_by_role("button", name="Stop").click()
    chat.place = None
    page.wait_for_timeout(700)
    assert page.evaluate("document.body.dataset.phase") == "idle"
    assert shown(page, "status") == "You ended the conversation."
    assert not any(connection.pcm for connection in chat.connections)


def test_nothing_is_fetched_from_elsewhere(context, chat):
    addresses = []
    context.on("request", lambda request: addresses.append(request.url))
    page = open_page(context, chat.url)
    talk(page)
    assert all(address.startswith((chat.url, "ws" + chat.url.removeprefix("http"))) for address in addresses)
    fetched = {path.removeprefix("/page/") for path in chat.paths}
    assert {path.name for path in FOLDER.iterdir()} - fetched <= {"index.html", "icon.svg"}
    refused = "fetch('http://localhost:1/').catch((error) => error.name)"
    policy = "new Promise((told) => addEventListener('securitypolicyviolation', (e) => told(e.violatedDirective)))"
    assert page.evaluate(f"Promise.all([{policy}, {refused}])") == ["connect-src", "TypeError"]
