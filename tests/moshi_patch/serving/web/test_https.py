"""`--ssl FOLDER`: the server speaks https with the certificate in it, and starts with no other."""

import asyncio
import ssl
import time

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moshi_patch.serving.web.listening import ssl_context
from tests.support.servers import START_S
from tests.support.sites import RealServer, stopping, write_certificate


@pytest.fixture
def folder(tmp_path):
    """With a certificate and its key."""
    both = write_certificate(tmp_path / "cert.pem")
    (tmp_path / "key.pem").write_bytes(both.read_bytes())
    return tmp_path


async def first_message(port: int, trusted: ssl.SSLContext) -> bytes:
    """What the server says first, as soon as it listens."""
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.ws_connect(f"wss://localhost:{port}/api/chat", ssl=trusted) as socket:
                    return await socket.receive_bytes()
            except aiohttp.ClientConnectorError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)


@pytest.mark.slow
def test_a_client_that_trusts_the_certificate_talks_over_https_and_nobody_over_http(ttt_repo, folder):
    trusted = ssl.create_default_context(cafile=folder / "cert.pem")
    server = RealServer(ttt_repo, folder / "log", "--ssl", str(folder))
    with stopping(server):
        assert asyncio.run(first_message(server.port, trusted)) == b"\x00"
        assert server.get("/healthz")[0] == 0  # http
        assert f"https://127.0.0.1:{server.port}" in server.log.read_text()


def spoil(folder, how: str) -> None:
    key = folder / "key.pem"
    if how == "no key":
        key.unlink()
    elif how == "of another":
        key.write_bytes(write_certificate(folder / "other.pem").read_bytes())
    elif how == "no certificate":
        (folder / "cert.pem").write_text("nothing")
    else:
        encryption = serialization.BestAvailableEncryption(b"secret")
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        key.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(*form))


@pytest.mark.parametrize("how", ["no key", "of another", "no certificate", "with a password"])
def test_a_certificate_that_cannot_be_used_is_refused_in_one_line_that_names_the_folder(folder, how):
    spoil(folder, how)
    with pytest.raises(ValueError, match=r"^--ssl .*: its cert\.pem and key\.pem cannot be used \(.+\)$") as refused:
        ssl_context(str(folder))
    assert str(folder) in str(refused.value)
