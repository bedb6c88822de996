"""Tickets: who has a token in the file comes in, once for each ticket, for half a minute; nobody else, at any rate."""

import asyncio
import hashlib
import logging
import os

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request

from moshi_patch.serving.web.access import Access
from moshi_patch.serving.web.limits import MOST_ADDRESSES, Limits, TooManyError
from moshi_patch.serving.web.listening import is_loopback, open_host_problem
from moshi_patch.serving.web.tickets import MOST_TICKETS, Tickets, add_ticket_routes

ANNA, OTTO, NEW = (hashlib.sha256(name.encode()).hexdigest()[:32] for name in ("anna", "otto", "new"))


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    write(path, f"# who may come in\n\nanna {ANNA}\nOtto  Müller\t{OTTO}\n")
    return path


def write(path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


def test_a_ticket_is_its_owners_and_good_once(token_file, clock):
    tickets = Tickets(token_file, clock=clock)
    one, two = tickets.issue(ANNA), tickets.issue(OTTO)
    assert len(one) >= 40
    assert one != two
    assert tickets.redeem(two) == "Otto Müller"
    assert tickets.redeem(two) is None
    assert tickets.redeem(one) == "anna"
    for wrong in ("", one, ANNA, "x" * 10_000, "\ud800"):
        assert tickets.redeem(wrong) is None
    for wrong in ("", ANNA[:-1], ANNA + "x", ANNA.upper(), "anna", "\ud800"):
        assert tickets.issue(wrong) is None


def test_a_ticket_is_good_for_half_a_minute_of_a_clock_that_never_jumps(token_file, clock, monkeypatch):
    tickets = Tickets(token_file, clock=clock)
    early, late = tickets.issue(ANNA), tickets.issue(ANNA)
    monkeypatch.setattr("time.time", lambda: 9e9)
    clock.now += 29.9
    assert tickets.redeem(early) == "anna"
    clock.now += 0.1
    assert tickets.redeem(late) is None


def test_tickets_that_nobody_uses_are_bounded(token_file, clock):
    tickets = Tickets(token_file, clock=clock)
    others = tickets.issue(OTTO)
    mine = [tickets.issue(ANNA) for _ in range(1000)]
    assert len(tickets._tickets) == MOST_TICKETS + 1
    assert [tickets.redeem(one) for one in mine[:-MOST_TICKETS]] == [None] * (1000 - MOST_TICKETS)
    assert {tickets.redeem(one) for one in mine[-MOST_TICKETS:]} == {"anna"}
    assert tickets.redeem(others) == "Otto Müller"


def test_who_is_taken_out_of_the_file_is_out_and_a_bad_file_changes_nothing(token_file, clock, caplog):
    caplog.set_level(logging.INFO)
    tickets = Tickets(token_file, clock=clock)
    early, otto = tickets.issue(ANNA), tickets.issue(OTTO)
    write(token_file, f"otto {OTTO}x\nemma {NEW}\n")
    os.utime(token_file, ns=(1, 1))
    clock.now += 2
    assert tickets.redeem(early) is None
    assert tickets.redeem(otto) is None
    assert tickets.issue(ANNA) is None
    assert not tickets.knows("anna")
    assert tickets.knows("emma")
    assert tickets.redeem(tickets.issue(NEW)) == "emma"
    for spoil in (lambda: write(token_file, "emma short\n"), token_file.unlink):
        spoil()
        clock.now += 2
        assert tickets.redeem(tickets.issue(NEW)) == "emma"
        assert "What it said before stays." in caplog.records[-1].message
    for secret in (ANNA, OTTO, NEW, "anna", "otto", "emma"):
        assert secret not in caplog.text.replace(str(token_file), "")


@pytest.mark.parametrize("begin", ["", "\ufeff", "\ufeff# people\r\n", "\ufeff\r\n"])
def test_a_file_of_any_editor_is_read(tmp_path, begin):
    path = tmp_path / "tokens"
    path.write_bytes(f"{begin}anna\t {ANNA} \r\n\t# \r\n  Otto\tMu\u0308ller {OTTO}\r\nanna {NEW}".encode())
    path.chmod(0o600)
    tickets = Tickets(path)
    assert [tickets.name_of(token) for token in (ANNA, OTTO, NEW)] == ["anna", "Otto Müller", "anna"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must have one or more lines"),
        ("# nothing\n", "must have one or more lines"),
        ("anna\n", "line 1: must be a name and a token"),
        (f"\nanna {ANNA[:21]}\n", "line 2: a token must have 22 to 512"),
        (f"anna {ANNA}ä\n", "line 1: a token must have"),
        (f"anna {'ab' * 16}\n", "line 1: no random token"),
        (f"{'a' * 65} {ANNA}\n", "line 1: .*65 characters"),
        (f"a\u200bb {ANNA}\n", "line 1: .*cannot be seen"),
        (f"anna {ANNA}\nAnna {OTTO}\n", "line 2: its name looks like another one"),
        (f"anna {ANNA}\notto {ANNA}\n", "line 2: its token is another person's, too"),
        (b"anna \xff\xfe\n", "must be a text in UTF-8"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_line_without_its_tokens(tmp_path, text, reason):
    path = tmp_path / "tokens"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    with pytest.raises(ValueError, match=rf"^{path}.*{reason}") as refused:
        Tickets(path)
    assert "\n" not in str(refused.value)
    assert ANNA[:21] not in str(refused.value)


def test_a_file_that_others_may_read_is_refused(tmp_path, token_file, caplog):
    for mode in (0o604, 0o602, 0o620, 0o644, 0o666, 0o601):
        token_file.chmod(mode)
        with pytest.raises(ValueError, match=rf"others may read or change it \(mode {mode:o}\): chmod 600"):
            Tickets(token_file)
    assert caplog.text == ""
    token_file.chmod(0o640)
    Tickets(token_file)
    assert "its group may read it" in caplog.text
    with pytest.raises(OSError, match=r"nosuch: cannot be read \(No such file or directory\)"):
        Tickets(tmp_path / "nosuch")
    with pytest.raises((OSError, ValueError), match=r"must be a file|Is a directory"):
        Tickets(tmp_path)


def ask(app: web.Application, *requests: tuple[str, dict]) -> list[tuple[int, dict, dict]]:
    """Status, JSON if there is any, and headers of the answers to (method, headers)."""

    async def talk() -> list:
        answers = []
        async with TestClient(TestServer(app)) as client:
            for method, headers in requests:
                async with client.request(method, "/api/ticket", headers=headers) as answer:
                    content = await answer.json() if answer.content_type == "application/json" else {}
                    answers.append((answer.status, content, dict(answer.headers)))
        return answers

    return asyncio.run(talk())


def app_with(tickets: Tickets, limits: Limits | None = None, origins: tuple[str, ...] = ()) -> web.Application:
    app = web.Application()
    Access("localhost", origins).attach(app)
    add_ticket_routes(app, tickets, limits)
    return app


def test_a_post_with_a_token_gives_a_ticket_and_anything_else_none(token_file, caplog):
    caplog.set_level(logging.DEBUG)
    tickets = Tickets(token_file)
    good, *bad, get = ask(
        app_with(tickets),
        ("POST", {"Authorization": f"Bearer {ANNA}"}),
        ("POST", {}),
        ("POST", {"Authorization": f"Bearer {ANNA}x"}),
        ("POST", {"Authorization": f"Basic {ANNA}"}),
        ("POST", {"Authorization": ANNA}),
        ("POST", {"Authorization": f"Bearer {'x' * 5000}"}),
        ("GET", {"Authorization": f"Bearer {ANNA}"}),
    )
    status, content, headers = good
    assert (status, content["expires_in"], headers["Cache-Control"]) == (200, 30.0, "no-store")
    assert tickets.redeem(content["ticket"]) == "anna"
    for status, content, headers in bad:
        assert (status, list(content), headers["WWW-Authenticate"]) == (401, ["error"], "Bearer")
    assert get[0] == 405
    assert ANNA not in caplog.text


def test_pages_of_other_sites_get_no_ticket_unless_they_are_allowed(token_file):
    tickets, token = Tickets(token_file), {"Authorization": f"Bearer {ANNA}"}
    evil, good = {"Origin": "https://evil.example"}, {"Origin": "https://good.example"}
    app = app_with(tickets, origins=("https://good.example",))
    answers = ask(app, ("POST", token | evil), ("OPTIONS", evil), ("OPTIONS", good), ("POST", token | good))
    assert [status for status, _, _ in answers] == [403, 403, 204, 200]
    assert answers[2][2]["Access-Control-Allow-Headers"] == "Authorization"
    assert answers[3][2]["Access-Control-Allow-Origin"] == "https://good.example"
    assert "Access-Control-Allow-Origin" not in answers[0][2]


def test_an_address_that_guesses_tokens_is_slowed_down(token_file, clock):
    limits = Limits(tickets_per_minute=5, clock=clock)
    wrong = ("POST", {"Authorization": "Bearer " + "x" * 30})
    answers = ask(app_with(Tickets(token_file), limits), *[wrong] * 5, ("POST", {"Authorization": f"Bearer {ANNA}"}))
    assert [status for status, _, _ in answers] == [401] * 5 + [429]
    assert answers[-1][2]["Retry-After"] == "12"
    clock.now += 12
    assert limits.ask_for_ticket("127.0.0.1") == 0
    assert limits.ask_for_ticket("127.0.0.1") == 12
    assert limits.ask_for_ticket("10.0.0.1") == 0
    for number in range(2 * MOST_ADDRESSES):
        limits.ask_for_ticket(str(number))
    assert len(limits._asked) == MOST_ADDRESSES


def test_a_token_that_is_used_from_everywhere_is_slowed_down_too(token_file, clock):
    limits = Limits(tickets_per_minute=3, trusted_proxies=1, clock=clock)
    token = {"Authorization": f"Bearer {ANNA}"}
    asked = [("POST", token | {"X-Forwarded-For": f"10.0.0.{number}"}) for number in range(5)]
    assert [status for status, _, _ in ask(app_with(Tickets(token_file), limits), *asked)] == 3 * [200] + 2 * [429]


def test_a_person_and_an_address_have_so_many_conversations_at_a_time():
    limits = Limits(per_person=1, per_address=2)
    with limits.conversation("anna", "10.0.0.1"):
        with pytest.raises(TooManyError, match="this person talks already"), limits.conversation("anna", "10.0.0.2"):
            pass
        with (
            limits.conversation(None, "10.0.0.1"),
            pytest.raises(TooManyError, match="this address has 2 conversations"),
            limits.conversation("otto", "10.0.0.1"),
        ):
            pass
        with limits.conversation("otto", "10.0.0.1"):
            pass
    with limits.conversation("anna", "10.0.0.1"):
        pass
    assert not limits._people
    assert not limits._addresses
    with pytest.raises(ValueError, match="per_address=0: must be a whole number, 1 or more"):
        Limits(per_address=0)


@pytest.mark.parametrize(
    ("proxies", "forwarded", "address"),
    [
        (0, ["1.2.3.4"], "9.9.9.9"),
        (1, [], "9.9.9.9"),
        (1, ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        (1, ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        (2, ["6.6.6.6, 1.2.3.4, 5.5.5.5"], "1.2.3.4"),
        (2, ["1.2.3.4"], "9.9.9.9"),
        (1, ["nonsense"], "9.9.9.9"),
        (1, ["6.6.6.6:1, 1.2.3.4:5678"], "1.2.3.4"),
        (1, ["[2001:db8:1:2:3:4:5:6]:443"], "2001:db8:1:2::/64"),
        (1, ["[2001:db8:1:2:3:4:5:6]"], "2001:db8:1:2::/64"),
        (1, ["1.2.3.4:99999"], "9.9.9.9"),
        (1, ["example.org:80"], "9.9.9.9"),
        (1, [","], "9.9.9.9"),
        (1, ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        (1, ["2001:db8:1:2::ffff"], "2001:db8:1:2::/64"),
        (1, ["::ffff:1.2.3.4"], "1.2.3.4"),
    ],
)
def test_where_somebody_comes_from_is_what_a_trusted_proxy_says_alone(proxies, forwarded, address):
    from multidict import CIMultiDict

    headers = CIMultiDict(("X-Forwarded-For", one) for one in forwarded)
    request = make_mocked_request("GET", "/", headers).clone(remote="9.9.9.9")
    assert Limits(trusted_proxies=proxies).address(request) == address


def test_without_tokens_only_this_machine_may_connect():
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"):
        assert is_loopback(host)
        assert open_host_problem(host, False) is None
    for host in ("", "0.0.0.0", "::", "10.0.0.1", "no such name"):
        problem = f"--host {host}: without --token-file only this machine may connect (--host localhost)"
        assert open_host_problem(host, False) == problem
        assert open_host_problem(host, True) is None
