"""The example of several servers: its files name options, addresses and files that are there."""

import re
import subprocess

import pytest
import yaml

from moshi_patch.server import server_parser, wrong_numbers
from moshi_patch.serving.web.front import CHAT_PATH
from moshi_patch.serving.web.operators import HEALTH_PATH, METRICS_PATH
from moshi_patch.serving.web.tickets import TICKET_PATH
from tests.support.sites import CONFIGURATION, write_certificate
from tests.support.tiny_repository import ROOT
from tests.support.tools import find_haproxy, needs_haproxy

FOLDER = ROOT / "example" / "serving"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


@needs_haproxy
@pytest.mark.slow
def test_haproxy_takes_the_configuration(tmp_path):
    variables = {"FIRST": "127.0.0.1:1", "SECOND": "127.0.0.1:2", "LISTEN": "127.0.0.1:3"}
    variables["CERTIFICATE"] = str(write_certificate(tmp_path / "site.pem"))
    command = [find_haproxy(), "-c", "-f", str(CONFIGURATION)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_the_proxy_and_the_servers_speak_of_the_same_addresses():
    configuration = CONFIGURATION.read_text()
    assert f"option httpchk GET {HEALTH_PATH}" in configuration
    allowed = re.search(r"deny_status 404 unless \{ path / \} \|\| \{ path_beg (.+) \}", configuration)[1].split()
    assert CHAT_PATH.startswith(tuple(allowed))
    assert TICKET_PATH.startswith(tuple(allowed))
    assert not METRICS_PATH.startswith(tuple(allowed))
    services = COMPOSE["services"]
    assert set(re.findall(r"\$\{(\w+)\}", configuration)) == services["haproxy"]["environment"].keys()
    for name in ("first", "second"):
        assert services["haproxy"]["environment"][name.upper()] == f"{name}:8998"
    assert "%{+Q}r" not in configuration
    assert "%HP" in configuration  # the path alone: a query holds a ticket


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_servers_options_are_those_of_the_server(name):
    service = COMPOSE["services"][name]
    words = [re.sub(r"\$\{SITE:\?[^}]*\}", "moshi.example.org", word) for word in service["command"]]
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.M)
    python, _, module, *first = yaml.safe_load(entry[1])
    assert (python, module) == ("python", "moshi_patch.server")
    options = server_parser("test").parse_args([*first, *words])
    assert wrong_numbers(options) is None
    assert options.allow_origin == ["https://moshi.example.org"]
    assert options.trusted_proxies == 1
    grace = int(re.fullmatch(r"(\d+)m", service["stop_grace_period"])[1]) * 60
    assert grace > options.drain_timeout + 60  # the minute that writing may take
    secrets = {word.rpartition("/")[2] for word in words if "/run/secrets/" in word}
    assert secrets == set(service["secrets"]) <= COMPOSE["secrets"].keys()


def test_what_the_image_is_made_of_is_there():
    sources = [name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M) for name in line.split()]
    assert {"pyproject.toml", "moshi_patch", "finetune"} <= set(sources)
    assert all((ROOT / name).exists() for name in sources)
