"""The page for everybody: by keyboard, with a screen reader, on a telephone, in light and dark, without motion."""

import pytest

from tests.support.browsers import open_page, talk, wait_for
from tests.support.tools import needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]

CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const linear = (v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = color.slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = rgb(getComputedStyle(at).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255, 255];
    };
    const found = {};
    for (const element of document.body.querySelectorAll("*")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || element.disabled || element.closest(".unseen")) continue;
        const [a, b] = [light(rgb(getComputedStyle(element).color)), light(behind(element))].sort();
        found[element.textContent.trim().slice(0, 30)] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }
    return found;
}"""
"""For every visible text, the contrast of WCAG 2 with what is behind it."""


@pytest.fixture
def new_page(browser, chat):
    """Opens the page as a device or a person's settings have it."""
    contexts = []

    def make(**settings):
        contexts.append(browser.new_context(**settings))
        return open_page(contexts[-1], chat.url)

    yield make
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_in_dark(scheme, new_page, chat):
    page = new_page(color_scheme=scheme)
    talk(page)
    wait_for(page, "document.querySelectorAll('#layers li').length === 2 && document.querySelector('#text p')")
    talking = page.evaluate(CONTRAST)
    assert {"Moshi with a memory", "Stop", "Forget me", "Connected: speak.", "Layer 5", "Chunk heard"} <= talking.keys()
    chat.hang_up(1011, "it fell over")
    wait_for(page, "document.body.dataset.phase === 'idle'")
    contrasts = talking | page.evaluate(CONTRAST)
    assert any(text.startswith("The server had an error") for text in contrasts)
    assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_telephone(width, new_page, chat):
    page = new_page(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    chat.asks_token = True
    page.get_by_role("button", name="Start talking").tap()
    wait_for(page, "document.activeElement.id === 'token'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    chat.asks_token = False
    page.get_by_label("Your token").fill("x")
    page.get_by_role("button", name="Go on").tap()
    wait_for(page, "document.querySelectorAll('#layers li').length === 2")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box["height"] >= 44, button
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    page.get_by_role("button", name="Forget me").tap()
    assert page.get_by_role("dialog").bounding_box()["width"] <= width


def test_everything_is_done_by_keyboard_in_the_order_that_is_seen(new_page, chat):
    page = new_page()
    focused = "document.activeElement.id || document.activeElement.textContent"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "talk"
    page.keyboard.press("Enter")
    wait_for(page, "document.body.dataset.phase === 'talking'")
    order = []
    for _ in range(4):
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        width = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
        assert (outline, width >= 2) == ("solid", True), order
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    assert order == ["updates", "forget", "new-person", "text"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert page.evaluate(focused) == "Keep it"  # what cannot be undone is not what Enter does
    page.keyboard.press("Escape")
    wait_for(page, "document.activeElement.id === 'forget'")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for(page, "document.getElementById('status').textContent === 'What you said was forgotten.'")
    assert chat.connections[0].wishes == [{"forget": True}]


def test_a_screen_reader_is_told_what_is_seen(new_page):
    page = new_page()
    talk(page)
    wait_for(page, "document.querySelectorAll('#layers li').length === 2")
    assert page.locator("html").get_attribute("lang") == "en"
    tree = page.locator("main").aria_snapshot()
    for line in [
        'heading "Moshi with a memory" [level=1]',
        'button "Learn from me" [pressed]',
        'meter "You"',
        'meter "Moshi"',
        'heading "What Moshi says" [level=2]',
        'heading "Layer 11" [level=3]',
        'meter "Layer 5: how much of the chunk is heard"',
        'meter "Layer 11: share of the last chunk that was known"',
    ]:
        assert line in tree, tree
    assert page.locator("#status").get_attribute("role") == "status"  # told politely
    assert page.locator("#problem").get_attribute("role") == "alert"
    assert page.locator("[data-part=chunk]").first.get_attribute("aria-valuetext").endswith(" %")
    # Pieces of words are shown as they come, and told as phrases: "Nim", "bus" would be two words.
    wait_for(page, "document.querySelector('#spoken p')")
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"
    assert page.locator("#spoken p").first.inner_text() == "my boat is Nimbus."
    assert page.locator("#text").get_attribute("aria-live") is None


def test_who_never_pauses_is_told_phrase_by_phrase_and_fills_no_memory(new_page):
    body = """async () => {
        const { Transcript } = await import("/page/transcript.js");
        const [shown, spoken] = [document.createElement("div"), document.createElement("div")];
        const transcript = new Transcript(shown, spoken);
        for (let at = 0; at < 40000; at++) transcript.add(at % 2 ? "la" : " tra");
        return [spoken.lastElementChild.textContent, shown.childElementCount, shown.textContent.length];
    }"""
    phrase, paragraphs, letters = new_page().evaluate(body)
    assert phrase == " ".join(["trala"] * 14)
    assert paragraphs <= 50
    assert 50_000 < letters <= 50 * 500 * 4


def test_nothing_moves_for_who_wants_no_motion(new_page):
    for motion, seconds in [("reduce", "0s"), ("no-preference", "0.1s")]:
        page = new_page(reduced_motion=motion)
        assert page.evaluate("getComputedStyle(document.querySelector('.meter > span')).transitionDuration") == seconds


def test_text_may_be_twice_as_large(new_page):
    page = new_page(viewport={"width": 640, "height": 700})
    page.evaluate("void (document.documentElement.style.fontSize = '200%')")
    talk(page)
    wait_for(page, "document.querySelectorAll('#layers li').length === 2")
    assert page.evaluate("document.documentElement.scrollWidth") <= 640
