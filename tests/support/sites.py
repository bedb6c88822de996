"""Shared by the tests of several servers: real ones in processes of their own, and HAProxy with the example's file."""

import contextlib
import datetime
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.tiny_repository import ENVIRONMENT, ROOT
from tests.support.tools import find_haproxy

START_S = 120
CONFIGURATION = ROOT / "example" / "serving" / "haproxy.cfg"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_certificate(path: Path) -> Path:
    """Key and certificate of `localhost`, good for a day, as HAProxy reads them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


class Process:
    """A program in a process of its own, whose output goes to a file."""

    def __init__(self, command: list[str], log: Path, **variables: str):
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT | variables, stdout=output, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        """As a machine that loses its power: kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = START_S) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()


class RealServer(Process):
    """`python -m moshi_patch.server` with a model of `repo`, on this machine.

    Attributes:
        port: where.
    """

    def __init__(self, repo: Path, log: Path, *options: str, port: int | None = None):
        self.port = port or free_port()
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--hf-repo", str(repo)]
        super().__init__([sys.executable, "-m", "moshi_patch.server", *where, *options], log)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an answer; (0, reason) without one."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def wait_until_healthy(self) -> "RealServer":
        deadline = time.monotonic() + START_S
        while self.get("/healthz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()
            if time.monotonic() > deadline:
                pytest.fail(f"No server after {START_S} s:\n{self.log.read_text()}")
            time.sleep(0.1)
        return self

    def wait_for_metrics(self, **numbers: float) -> None:
        """Until the server says these of itself."""
        deadline = time.monotonic() + START_S
        while not all(f"{name} {number}" in self.get("/metrics")[1] for name, number in numbers.items()):
            assert time.monotonic() < deadline, self.get("/metrics")
            time.sleep(0.1)


class HAProxy(Process):
    """The example's configuration before two servers, at `https://localhost:PORT`."""

    def __init__(self, folder: Path, first: int, second: int, port: int):
        self.port = port
        super().__init__(
            [find_haproxy(), "-db", "-f", str(CONFIGURATION)],
            folder / "haproxy.log",
            LISTEN=f"127.0.0.1:{port}",
            CERTIFICATE=str(write_certificate(folder / "site.pem")),
            FIRST=f"127.0.0.1:{first}",
            SECOND=f"127.0.0.1:{second}",
        )

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def client(self) -> aiohttp.ClientSession:
        """As a browser that has never been here: it keeps cookies, and names the page's origin."""
        connector = aiohttp.TCPConnector(ssl=False)
        return aiohttp.ClientSession(self.url, connector=connector, headers={"Origin": self.url})


@contextlib.contextmanager
def stopping(*processes: Process) -> Iterator[None]:
    """None of them survives the block, nor those that a list among them gets meanwhile."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
