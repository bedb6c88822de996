"""Where a server may listen, with how many connections, and with which certificate."""

import contextlib
import errno
import ipaddress
import os
import resource
import socket
import ssl
from pathlib import Path


def open_host_problem(host: str, has_tokens: bool) -> str | None:
    """Why a server may not listen on `host`: without tokens anybody who reaches it may talk. None when it may."""
    if has_tokens or is_loopback(host):
        return None
    return f"--host {host}: without --token-file only this machine may connect (--host localhost)"


def address_problem(host: str, port: int) -> str | None:
    """Why a server cannot listen there, known before its model is loaded; None when it can."""
    if not 0 <= port <= 65_535:
        return f"--port {port}: must be a number from 0 to 65535"
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        return f"--host {host}: no such address ({getattr(error, 'strerror', None) or error})"
    problems = [binding_error(*address) for address in addresses]
    if errno.EADDRINUSE in problems:
        return f"--port {port}: another program listens there already; stop it, or choose another port"
    if all(problems):
        return f"--host {host} --port {port}: cannot listen there ({os.strerror(problems[0])})"
    return None


def binding_error(family: int, kind: int, protocol: int, _: str, address: tuple) -> int | None:
    """The system's number for why nothing can listen at an address, as `asyncio` would; None when it can."""
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE) if host else []
        addresses = [ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in found]
    except (OSError, UnicodeError, ValueError):
        return False
    return bool(addresses) and all(address.is_loopback for address in addresses)


def allow_many_connections() -> None:
    """As many open files as the system lets this process have: each connection is one, and 1024 are soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # on macOS, unlimited is refused
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def ssl_context(folder: str | None) -> ssl.SSLContext | None:
    """Of `cert.pem` and `key.pem` in a folder, as `--ssl` of the stock server takes it; None without one.

    Raises:
        ValueError: in one line that names the folder.
    """
    if folder is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

    def no_password() -> str:  # else openssl would ask for one on the terminal
        raise ValueError("the key has a password")

    try:
        context.load_cert_chain(Path(folder) / "cert.pem", Path(folder) / "key.pem", no_password)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ValueError(f"--ssl {folder}: its cert.pem and key.pem cannot be used ({reason})") from error
    return context
