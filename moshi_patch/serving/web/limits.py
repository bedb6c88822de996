"""How much one person, or one address, may have of a server at a time."""

import contextlib
import ipaddress
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from aiohttp import web

from .access import is_address, parse_host

MOST_ADDRESSES = 10_000
"""Addresses whose requests are counted at a time; with more, the one heard of longest ago is forgotten."""


class TooManyError(Exception):
    """The text says of what."""


class Limits:
    """Counts connections and tickets. Call it from one thread.

    Args:
        per_person: conversations of one name at a time; a memory has one writer, so more than one makes no sense.
        per_address: conversations of one address at a time.
        tickets_per_minute: that one address may ask for, with a right token or a wrong one, and one person.
        trusted_proxies: how many proxies of one's own stand before the server, each adding to `X-Forwarded-For`; 0:
            that header is passed over, as anybody can send it.
        clock: seconds, that never jump.
    """

    def __init__(
        self,
        per_person: int = 1,
        per_address: int = 8,
        tickets_per_minute: int = 30,
        trusted_proxies: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value, low in (
            ("per_person", per_person, 1),
            ("per_address", per_address, 1),
            ("tickets_per_minute", tickets_per_minute, 1),
            ("trusted_proxies", trusted_proxies, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r}: must be a whole number, {low} or more.")
        self.per_person, self.per_address = per_person, per_address
        self.tickets_per_minute, self.trusted_proxies = tickets_per_minute, trusted_proxies
        self._clock = clock
        self._people: Counter[str] = Counter()
        self._addresses: Counter[str] = Counter()
        self._asked: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tickets left, and as of when

    def address(self, request: web.Request) -> str:
        """Where a request comes from. IPv6 addresses are told apart by their first 64 bits: a home has them all."""
        text = request.remote or "unknown"
        if self.trusted_proxies:
            forwarded = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
            hops = [part.strip() for part in forwarded if part.strip()]
            hop = hops[-self.trusted_proxies] if len(hops) >= self.trusted_proxies else ""
            with_port = parse_host(hop, "http")  # as some proxies write it
            text = next((one for one in (hop, with_port[0] if with_port else "") if is_address(one)), text)
        if not is_address(text):
            return text
        address = ipaddress.ip_address(text)
        if address.version == 6:
            mapped = address.ipv4_mapped
            return str(mapped) if mapped else str(ipaddress.ip_network((int(address), 64), strict=False))
        return str(address)

    @contextlib.contextmanager
    def conversation(self, name: str | None, address: str) -> Iterator[None]:
        """Inside, somebody talks.

        Args:
            name: None where nobody has one.

        Raises:
            TooManyError: when they, or their address, have as many conversations as they may.
        """
        if name is not None and self._people[name] >= self.per_person:
            raise TooManyError("this person talks already")
        if self._addresses[address] >= self.per_address:
            raise TooManyError(f"this address has {self.per_address} conversations already")
        counted = [(self._addresses, address), *([(self._people, name)] if name is not None else [])]
        for counter, key in counted:
            counter[key] += 1
        try:
            yield
        finally:
            for counter, key in counted:
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

    def ask_for_ticket(self, address: str) -> int:
        """0 when `address`, or any other key, may have one now, which counts; else seconds to wait."""
        now, rate = self._clock(), self.tickets_per_minute / 60
        left, then = self._asked.pop(address, (float(self.tickets_per_minute), now))
        left = min(left + (now - then) * rate, float(self.tickets_per_minute))
        allowed = left >= 1
        self._asked[address] = (left - allowed, now)
        if len(self._asked) > MOST_ADDRESSES:
            self._asked.popitem(last=False)
        return 0 if allowed else math.ceil((1 - left) / rate)
