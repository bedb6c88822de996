"""Keeps pages of other sites away from a server on this machine: what a browser sends says where it comes from.

A page that someone visits may open a websocket to any address, `localhost` included; the browser adds the page's
`Origin` and lets it. And a site may point its own name to this machine (DNS rebinding): then all looks like its own
origin, and `Host` is that name. Programs that are no browsers send no `Origin` and are let in.
"""

import ipaddress
import logging
import re
from collections.abc import Sequence
from typing import Any

from aiohttp import web

logger = logging.getLogger(__name__)

DEFAULT_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]
"""Scheme, host and port."""


class Access:
    """Lets in pages that the server serves itself and pages of the origins named, under names that are the server's.

    Those names are `localhost` and those below it, addresses in numbers, `host`, and the hosts of `origins`.

    Args:
        host: what the server was told to listen on.
        origins: of pages of other sites that may use it, such as `https://example.org`.
        tunnel: whether names below gradio.live, which moshi's tunnel gives, are the server's too.
    """

    def __init__(self, host: str, origins: Sequence[str] = (), tunnel: bool = False):
        self.origins = {parse_origin(origin) for origin in origins}
        self.names = {"localhost", host.lower(), *(name for _, name, _ in self.origins)}
        self.tunnel = tunnel

    def attach(self, app: web.Application) -> None:
        """Guards every address of `app`, which is not yet running."""
        app.middlewares.insert(0, self._middleware)
        app.on_response_prepare.append(self._let_it_read)

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        problem = self.problem(request)
        if problem:
            logger.warning("Refused a request from %s: %s", request.remote, problem)
            raise web.HTTPForbidden(text=f"{problem}\n")
        return await handler(request)

    def problem(self, request: web.Request) -> str | None:
        """Why `request` is refused; None when it is not."""
        hosts = [parse_host(host, request.scheme) for host in request.headers.getall("Host", [])]
        for host, text in zip(hosts, request.headers.getall("Host", []), strict=True):
            if host is None or not self._is_own(host[0]):
                return (
                    f"Host {text[:100]!r} is no name of this server. --allow-origin {request.scheme}://HOST adds one."
                )
        own = {(request.scheme, *host) for host in hosts}
        own |= {("https", name, 443) for name, _ in hosts if self._is_tunnel(name)}
        for text in request.headers.getall("Origin", []):
            if parse_origin(text) not in own | self.origins:
                return f"Origin {text[:100]!r} may not use this server. --allow-origin ORIGIN allows one."
        return None

    def _is_own(self, name: str) -> bool:
        return name in self.names or name.endswith(".localhost") or is_address(name) or self._is_tunnel(name)

    def _is_tunnel(self, name: str) -> bool:
        return self.tunnel and name.endswith(".gradio.live")

    async def _let_it_read(self, request: web.Request, response: web.StreamResponse) -> None:
        """Tells the browser that a page of an allowed origin may read this answer."""
        origin = request.headers.get("Origin")
        if origin and parse_origin(origin) in self.origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"


def is_address(name: str) -> bool:
    """Whether a host is given in numbers. No other site can have such a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def parse_host(text: str, scheme: str) -> tuple[str, int] | None:
    """Name and port of a `Host` header; None for what is none."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::(\d{1,5}))?", text.lower(), re.ASCII)
    port = int(match[3] or DEFAULT_PORTS[scheme]) if match else -1
    return ((match[1] or match[2]).rstrip("."), port) if match and port <= 65_535 else None


def parse_origin(text: str) -> Origin | None:
    """Of an `Origin` header, or of what someone typed; None for what is none, such as `null`."""
    scheme, separator, rest = text.strip().lower().partition("://")
    host = parse_host(rest.removesuffix("/"), scheme) if separator and scheme in DEFAULT_PORTS else None
    return host and (scheme, *host)
