"""Who may come in: tokens in a file, each with a name, and short-lived tickets for those who have one.

A browser's websocket can send no header, and addresses end up in logs. So a client gets a ticket by a POST with its
token in a header, and the address of its websocket has that ticket alone: good once, for half a minute.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from ..memories.persons import check_person, look_alike
from ..memories.secret_files import read_secret_file
from .limits import Limits

logger = logging.getLogger(__name__)

TICKET_PATH = "/api/ticket"
TICKET_S = 30.0
"""Seconds for which a ticket is good."""

MOST_TICKETS = 8
"""Of one person at a time; a further one takes the place of their oldest."""

SHORTEST_TOKEN, LONGEST_TOKEN = 22, 512
"""Characters; 22 of base64 are 128 bits."""

LOOK_EVERY_S = 1.0
"""Seconds between two looks at whether the file has changed."""


@dataclass(frozen=True)
class _Ticket:
    name: str
    token: bytes
    expires: float


class Tickets:
    """Issues tickets to those whose token stands in a file, and redeems each once. Call it from one thread.

    The file is read again when it changed; one that is wrong then is logged, and what it said before stays.

    Args:
        token_file: one `name token` a line, `#` begins a comment; for its owner alone. A name may have several lines.
        seconds: for which a ticket is good.
        clock: seconds, that never jump.

    Raises:
        ValueError, OSError: in one line that names the file, and the line.
    """

    def __init__(self, token_file: str | Path, seconds: float = TICKET_S, clock: Callable[[], float] = time.monotonic):
        self.token_file, self.seconds, self._clock = Path(token_file), seconds, clock
        self._version = _version(self.token_file)
        self._tokens = read_tokens(self.token_file)  # name by digest
        self._looked = clock()
        self._tickets: OrderedDict[bytes, _Ticket] = OrderedDict()  # by digest, the oldest first

    def name_of(self, token: str) -> str | None:
        """Whose token it is; None when it is nobody's."""
        self._look()
        mine, name = _digest(token), None
        for digest, whose in self._tokens.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, mine):
                name = whose
        return name

    def issue(self, token: str) -> str | None:
        """A ticket for whoever has `token`; None when nobody does."""
        name = self.name_of(token)
        if name is None:
            return None
        self._drop_old(name)
        ticket = secrets.token_urlsafe(32)
        self._tickets[_digest(ticket)] = _Ticket(name, _digest(token), self._clock() + self.seconds)
        return ticket

    def redeem(self, ticket: str) -> str | None:
        """Whose ticket it is, once; None for one that is wrong, was used, is too old, or whose token was revoked."""
        self._look()
        found = self._tickets.pop(_digest(ticket), None)
        if found is None or found.expires <= self._clock() or self._tokens.get(found.token) != found.name:
            return None
        return found.name

    def knows(self, name: str) -> bool:
        """Whether `name` still stands in the file: ask now and then for those who talk, and end who does not."""
        self._look()
        return name in self._tokens.values()

    def _drop_old(self, name: str) -> None:
        now = self._clock()
        for digest, ticket in list(self._tickets.items()):
            if ticket.expires <= now:
                del self._tickets[digest]
        mine = [digest for digest, ticket in self._tickets.items() if ticket.name == name]
        for digest in mine[: max(0, len(mine) - MOST_TICKETS + 1)]:
            del self._tickets[digest]

    def _look(self) -> None:
        if self._clock() - self._looked < LOOK_EVERY_S:
            return
        self._looked = self._clock()
        version = _version(self.token_file)
        if version == self._version:
            return
        self._version = version
        try:
            self._tokens = read_tokens(self.token_file)
            logger.info("%s: read again, %d tokens.", self.token_file, len(self._tokens))
        except (ValueError, OSError) as error:
            logger.error("%s What it said before stays.", error)


def read_tokens(path: Path) -> dict[bytes, str]:
    """Names by the SHA-256 of their token.

    Raises:
        ValueError, OSError: in one line that names the file and the line, but no token.
    """
    try:
        lines = read_secret_file(path).decode("utf-8-sig").splitlines()  # some editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be a text in UTF-8.") from error
    tokens: dict[bytes, str] = {}
    alike: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name, token = _name_and_token(line)
            if alike.setdefault(look_alike(name), name) != name:
                raise ValueError("its name looks like another one in this file.")
            if tokens.setdefault(_digest(token), name) != name:
                raise ValueError("its token is another person's, too.")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not tokens:
        raise ValueError(f"{path}: must have one or more lines of a name and a token.")
    return tokens


def _name_and_token(line: str) -> tuple[str, str]:
    parts = line.split()
    if len(parts) < 2:
        raise ValueError("must be a name and a token.")
    name, token = unicodedata.normalize("NFC", " ".join(parts[:-1])), parts[-1]
    check_person(name)
    if not (token.isascii() and token.isprintable() and SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN):
        raise ValueError(
            f"a token must have {SHORTEST_TOKEN} to {LONGEST_TOKEN} letters and digits (openssl rand -hex 32)."
        )
    if len(set(token)) < 8:
        raise ValueError("no random token (openssl rand -hex 32).")
    return name, token


def add_ticket_routes(app: web.Application, tickets: Tickets, limits: Limits | None = None) -> None:
    """Has `app` answer `POST /api/ticket` with `Authorization: Bearer TOKEN`: `{"ticket": ..., "expires_in": 30}`.

    401 without a token that is known, 429 for an address or a person who asks too often. Put :class:`.access.Access`
    before it.
    """

    async def issue(request: web.Request) -> web.Response:
        if limits is not None and (wait := limits.ask_for_ticket(limits.address(request))):
            return _refusal(429, "too many tickets asked for", {"Retry-After": str(wait)})
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" and len(token) <= LONGEST_TOKEN else ""
        name = tickets.name_of(token)
        if name is None:
            return _refusal(401, "no known token in Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        if limits is not None and (wait := limits.ask_for_ticket(f"person {name}")):
            return _refusal(429, "too many tickets asked for", {"Retry-After": str(wait)})
        answer = {"ticket": tickets.issue(token), "expires_in": tickets.seconds}
        return web.json_response(answer, headers={"Cache-Control": "no-store"})

    async def may_ask(request: web.Request) -> web.Response:
        """What a browser asks before a page of another origin may send its token; `Access` says who may."""
        allowed = {"Access-Control-Allow-Methods": "POST", "Access-Control-Allow-Headers": "Authorization"}
        return web.Response(status=204, headers=allowed)

    app.router.add_post(TICKET_PATH, issue)
    app.router.add_options(TICKET_PATH, may_ask)


def _refusal(status: int, reason: str, headers: dict[str, str]) -> web.Response:
    return web.json_response({"error": reason}, status=status, headers={"Cache-Control": "no-store", **headers})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _version(path: Path) -> tuple[int, ...] | None:
    """Changes with the file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
