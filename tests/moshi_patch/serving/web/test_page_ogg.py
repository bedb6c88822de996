"""The page's Ogg, run in Chromium, against libopus and the bytes of sphn: both ways, cut anywhere, damaged."""

import base64

import numpy as np
import pytest
import sphn

from tests.support.servers import RATE, speech, user_speech
from tests.support.tools import needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]

HELPERS = """
    const ogg = await import('/page/ogg.js');
    const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const text = (data) => btoa(String.fromCharCode(...data));
"""


@pytest.fixture(scope="module")
def script(browser, only_fake_chat):
    """Runs the body of a function with one argument in a page that may import the page's modules."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(only_fake_chat.url)
        yield lambda body, argument: page.evaluate(f"async (given) => {{ {HELPERS} {body} }}", argument)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


READ = """
    const reader = new ogg.OggReader();
    const packets = [];
    const { step } = given, stream = bytes(given.stream);
    for (let at = 0; at < stream.length; at += step) packets.push(...reader.read(stream.slice(at, at + step)));
"""


@pytest.mark.parametrize("step", [1, 7, 100, 100_000])
def test_packets_are_the_same_wherever_the_stream_is_cut(step, script):
    stream = b"".join(speech())
    packets = script(READ + "return packets.map(text)", {"stream": encoded(stream), "step": step})
    whole = script(READ + "return packets.map(text)", {"stream": encoded(stream), "step": len(stream)})
    assert packets == whole
    assert base64.b64decode(packets[0]).startswith(b"OpusHead")
    assert base64.b64decode(packets[1]).startswith(b"OpusTags")
    assert len(packets) > 40


def test_packets_put_into_pages_again_sound_the_same(script):
    stream = b"".join(speech())
    body = """
        const writer = new ogg.OggWriter(7);
        const sound = packets.filter((packet) => !ogg.isHeader(packet));
        const pages = [writer.begin(packets[0])];
        while (sound.length) pages.push(writer.write(sound.splice(0, given.group)));
        return { pages: pages.map(text), position: writer.position };
    """
    expected = sphn.OpusStreamReader(RATE).append_bytes(stream)
    for group in (1, 2, 5):
        made = script(READ + body, {"stream": encoded(stream), "step": 1000, "group": group})
        again = b"".join(map(base64.b64decode, made["pages"]))
        heard = sphn.OpusStreamReader(RATE).append_bytes(again)
        assert np.array_equal(heard, expected)
        assert len(user_speech()) - 1920 <= made["position"] / 2 <= len(user_speech()) + 1920


def test_a_damaged_page_costs_its_own_sound_alone(script):
    messages = speech()
    stream = bytearray(b"".join(messages))
    count = len(script(READ + "return packets.map(text)", {"stream": encoded(stream), "step": 1000}))
    stream[len(stream) // 2] ^= 1
    left = script(READ + "return packets.map(text)", {"stream": encoded(stream), "step": 1000})
    assert count - 8 <= len(left) < count
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    kept = script(READ + "return packets.map(text)", {"stream": encoded(noise + b"".join(messages)), "step": 1000})
    assert len(kept) == count
    rest = script(READ + "return reader.rest.length", {"stream": encoded(noise), "step": 1000})
    assert rest < 66_000  # garbage is not kept beyond what one page could hold


def test_packets_of_every_length_keep_theirs(script):
    body = """
        const writer = new ogg.OggWriter(7), reader = new ogg.OggReader();
        const sent = given.map((length) => new Uint8Array(length).fill(0x98));
        const got = reader.read(writer.write(sent));
        return [got.map((packet) => packet.length), writer.position];
    """
    lengths = [1, 2, 254, 255, 256, 509, 510, 511, 1275]
    assert script(body, lengths) == [lengths, 960 * len(lengths)]


@pytest.mark.parametrize(
    ("first_bytes", "samples"),
    [([0x08], 960), ([0x98], 960), ([0x99], 1920), ([0x9B, 3], 2880), ([0x80], 120), ([0x68], 960), ([0x18], 2880)],
    ids=["SILK 20 ms", "CELT 20 ms", "two frames", "three frames", "2.5 ms", "hybrid 20 ms", "SILK 60 ms"],
)
def test_a_packet_says_how_long_it_plays(first_bytes, samples, script):
    assert script("return ogg.packetSamples(Uint8Array.from(given))", first_bytes) == samples
