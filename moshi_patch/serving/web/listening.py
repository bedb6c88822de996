"""Where a server may listen, with how many connections, and with which certificate."""

import contextlib
import ipaddress
import resource
import socket
import ssl
from pathlib import Path


def open_host_problem(host: str, has_tokens: bool) -> str | None:
    """Why a server may not listen on `host`: without tokens anybody who reaches it may talk. None when it may."""
    if has_tokens or is_loopback(host):
        return None
    return f"--host {host}: without --token-file only this machine may connect (--host localhost)"


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
