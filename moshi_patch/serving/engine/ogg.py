"""Cuts the sound of a client into pages of less than a second, whatever it sends in one message.

sphn's decoder has room for five seconds at a time and calls more "invalid argument"; and what is decoded in one go
lets nobody else be heard. A page of Ogg may hold up to 255 packets of Opus, 30 s of sound in some hundred bytes.
"""

import collections
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

from aiohttp import WSMessage, WSMsgType, web

PACKETS_PER_PAGE = 8
"""A packet of Opus holds at most 0.12 s."""

CAPTURE = b"OggS"
HEADER_SIZE = 27
"""Bytes of a page before its table of segments: capture pattern, version, flags, granule position (8), serial number
(4), page number (4), checksum (4), number of segments."""

FLAGS, CHECKSUM = 5, slice(22, 26)
CONTINUED, FIRST, LAST = 1, 2, 4
"""Flags of a page: begins in the middle of a packet; begins, and ends, a stream."""

REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

AUDIO = b"\x01"
"""First byte of a message that holds sound."""


class OggPages:
    """Cuts a stream of bytes, as it comes, into Ogg pages of at most `PACKETS_PER_PAGE` packets.

    What is no whole page of Ogg is passed on as it is, for the decoder to refuse.
    """

    def __init__(self) -> None:
        self._kept = b""  # the beginning of a page
        self._open = False  # whether the last page ended in the middle of a packet

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces that `data` completes, in order."""
        data, pieces, start = self._kept + data, [], 0
        while (found := data.find(CAPTURE, start)) >= 0:
            if found > start:
                pieces.append(data[start:found])
            start, size = found, page_size(data, found)
            if size is None or found + size > len(data):
                break
            page = data[found : found + size]
            pieces += cut(without_empty_packets(page, self._open))
            self._open = size > HEADER_SIZE and page[HEADER_SIZE + page[HEADER_SIZE - 1] - 1] == 255
            start += size
        else:
            kept = next((n for n in (3, 2, 1) if data.endswith(CAPTURE[:n], start)), 0)
            if start < len(data) - kept:
                pieces.append(data[start : len(data) - kept])
            start = len(data) - kept
        self._kept = data[start:]
        return pieces


def page_size(data: bytes, start: int) -> int | None:
    """Bytes of the page that begins at `start`; of the capture pattern for what is no page; None: more are needed."""
    if len(data) > start + 4 and data[start + 4] != 0:  # the version
        return len(CAPTURE)
    if len(data) < start + HEADER_SIZE:
        return None
    table = start + HEADER_SIZE
    segments = data[table - 1]
    if len(data) < table + segments:
        return None
    return HEADER_SIZE + segments + sum(data[table : table + segments])


def is_first(page: bytes) -> bool:
    """Whether a stream begins with `page`."""
    return page.startswith(CAPTURE) and len(page) > FLAGS and bool(page[FLAGS] & FIRST)


def packets_in(page: bytes) -> int:
    """How many packets end in `page`; 0 for what is none."""
    if len(page) < HEADER_SIZE or not page.startswith(CAPTURE):
        return 0
    return sum(size < 255 for size in page[HEADER_SIZE : HEADER_SIZE + page[HEADER_SIZE - 1]])


def without_empty_packets(page: bytes, is_open: bool) -> bytes:
    """`page` without packets of no bytes, which Opus does not have (RFC 7845): sphn would make five seconds of each.

    Args:
        is_open: whether the page before ended in the middle of a packet.
    """
    if len(page) < HEADER_SIZE:
        return page
    table = page[HEADER_SIZE : HEADER_SIZE + page[HEADER_SIZE - 1]]
    before = [255 if is_open else 0, *table[:-1]]
    rest = bytes(size for size, last in zip(table, before, strict=False) if size or last == 255)
    if len(rest) == len(table):
        return page
    shorter = page[: HEADER_SIZE - 1] + bytes([len(rest)]) + rest + page[HEADER_SIZE + len(table) :]
    return shorter[: CHECKSUM.start] + checksum(shorter) + shorter[CHECKSUM.stop :]


def cut(page: bytes) -> Iterator[bytes]:
    """Pages with the packets of `page`, few in each. A page that has few, or is damaged, stays as it is."""
    table_end = HEADER_SIZE + page[HEADER_SIZE - 1] if len(page) >= HEADER_SIZE else len(page)
    table = page[HEADER_SIZE:table_end]
    ends = [index + 1 for index, size in enumerate(table) if size < 255]
    if len(ends) <= PACKETS_PER_PAGE or checksum(page) != page[CHECKSUM]:
        yield page
        return
    borders = [0, *ends[PACKETS_PER_PAGE - 1 : -1 : PACKETS_PER_PAGE], len(table)]
    for begin, end in itertools.pairwise(borders):
        flags = page[FLAGS] & ((0 if begin else CONTINUED | FIRST) | (LAST if end == len(table) else 0))
        body = page[table_end + sum(table[:begin]) : table_end + sum(table[:end])]
        part = page[:5] + bytes([flags]) + page[6:26] + bytes([end - begin]) + table[begin:end] + body
        yield part[: CHECKSUM.start] + checksum(part) + part[CHECKSUM.stop :]


def checksum(page: bytes) -> bytes:
    """Ogg's checksum of a page: zlib's polynomial with the bits the other way round, without its first and last xor."""
    zeroed = page[: CHECKSUM.start] + bytes(4) + page[CHECKSUM.stop :]
    mirrored = zlib.crc32(zeroed.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2).to_bytes(4, "little")


def cut_messages(socket: web.WebSocketResponse) -> None:
    """Has whoever reads `socket` receive the sound of each message page by page, as if the client had sent it so."""
    stock_receive, pages, waiting = socket.receive, OggPages(), collections.deque()

    async def receive(*args: Any, **kwargs: Any) -> WSMessage:
        while not waiting:
            message = await stock_receive(*args, **kwargs)
            if message.type is not WSMsgType.BINARY or message.data[:1] != AUDIO:
                return message
            waiting.extend(pages.feed(message.data[1:]))
        return WSMessage(WSMsgType.BINARY, AUDIO + waiting.popleft(), None)

    socket.receive = receive
