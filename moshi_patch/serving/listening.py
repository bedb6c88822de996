"""Where a server may listen."""

import ipaddress
import socket


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
