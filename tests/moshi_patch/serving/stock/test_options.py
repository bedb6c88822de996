"""What is told before a model is loaded: options that make no sense, a taken port; and servers of another kind."""

import os
import socket

import pytest
from aiohttp import web
from huggingface_hub.utils import LocalEntryNotFoundError
from moshi.models import loaders

from moshi_patch.__main__ import main
from moshi_patch.repository import local_repositories
from moshi_patch.serving.stock import stock_server
from moshi_patch.serving.stock.stock_server import Options, add_conversations, split_options
from moshi_patch.serving.web.access import Access


def test_the_options_are_taken_out_and_the_server_gets_the_rest(tmp_path):
    path = tmp_path / "memory"
    stock = ["--device", "cpu", "--half", "--hf-repo", "repo", "--port", "0", "--static", "none"]
    assert split_options(stock) == (Options(port=0, static="none"), stock)
    assert split_options(["--memory", str(path), *stock]) == (Options(path, port=0, static="none"), stock)
    assert split_options([*stock[:2], f"--memory={path}", *stock[2:], "--idle-timeout", "0"]) == (
        Options(path, 0, port=0, static="none"),
        stock,
    )
    pages = ["--allow-origin", "https://a.example", "--allow-origin=http://b.example:81"]
    listening = [*stock, "--host=127.0.0.1", "--gradio-tunnel"]
    assert split_options([*pages, *listening]) == (
        Options(None, 30.0, ("https://a.example", "http://b.example:81"), "127.0.0.1", 0, True, "none"),
        listening,
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--memory"], "expected one argument"),
        (["--memory", "nosuch/memory"], "--memory nosuch/memory: must be a file in a folder that exists"),
        (["--memory", "."], "--memory .: must be a file"),
        (["--idle-timeout", "-1"], "--idle-timeout -1.0: must be seconds, 0 or more"),
        (["--idle-timeout", "nan"], "--idle-timeout nan: must be"),
        (["--idle-timeout", "soon"], "invalid float value: 'soon'"),
        (["--allow-origin", "*"], "--allow-origin *: must be an origin such as https://example.org, without a path"),
        (["--allow-origin", "example.org"], "--allow-origin example.org: must be an origin"),
        (["--allow-origin", "https://example.org/page"], "--allow-origin https://example.org/page: must be an origin"),
        (["--allow-origin", "file://"], "--allow-origin file://: must be an origin"),
        (["--allow-origin", "http://a:99999"], "--allow-origin http://a:99999: must be an origin"),
        (["--allow-origin"], "expected one argument"),
        (["--port", "70000"], "--port 70000: must be a number from 0 to 65535"),
        (["--port", "-1"], "--port -1: must be a number from 0 to 65535"),
        (["--port", "http"], "invalid int value: 'http'"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: no such address"),
        (["--host", "a" * 70], f"--host {'a' * 70}: no such address"),
        (["--host", "192.0.2.1", "--port", "0"], "--host 192.0.2.1 --port 0: cannot listen there"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_loaded(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        split_options(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "python -m moshi_patch moshi.server: error: " in line
    assert reason in line


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0"])
def test_a_port_that_another_program_listens_at_is_told_before_anything_is_loaded(host, capsys, patched):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as exit_:
            main(["moshi.server", "--host", host, "--port", str(port), "--hf-repo", "nosuch/model"])
        assert exit_.value.code == 2
        assert f"--port {port}: another program listens there already" in capsys.readouterr().err
        client = socket.create_connection(other.getsockname())
        other.accept()[0].close()  # the server closes first, and its end of the connection lingers
        client.close()
    assert split_options(["--host", host, "--port", str(port), "--static", "none"])[0].port == port


@pytest.mark.parametrize("page", [None, "none", "folder"])
def test_moshis_page_is_fetched_before_the_weights_or_its_absence_told(page, stock_repo, monkeypatch, patched):
    asked = []

    def no_connection(*names):
        asked.append(names)
        raise LocalEntryNotFoundError("no connection\nand no cache")

    monkeypatch.setattr(stock_server, "hf_hub_download", no_connection)
    with add_conversations(Options(static=page)), local_repositories():
        if page:
            assert loaders.CheckpointInfo.from_hf_repo(str(stock_repo))
            assert asked == []
        else:
            with pytest.raises(SystemExit) as exit_:
                loaders.CheckpointInfo.from_hf_repo(str(stock_repo))
            told = "moshi's page cannot be fetched from the Hub (no connection and no cache): --static none serves"
            assert str(exit_.value.code).startswith(told)
            assert asked == [("kyutai/moshi-artifacts", "dist.tgz")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        split_options(["--memory", str(tmp_path / "memory")])
    assert "can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--memory=m", "--idle-timeout=3", "--allow-origin=http://a"])
def test_other_programs_of_moshi_refuse_the_servers_options(option, capsys, patched):
    with pytest.raises(SystemExit) as exit_:
        main(["moshi.run_inference", option, "in.wav", "out.wav"])
    assert exit_.value.code == 2
    name = option.partition("=")[0]
    assert f"{name} is an option of moshi.server, not of moshi.run_inference" in capsys.readouterr().err


async def another_answer(request: web.Request) -> web.Response:
    return web.Response(text="chat")


def test_a_server_of_another_kind_is_served_as_it_is_and_a_warning_says_what_is_missing(monkeypatch, caplog):
    app = web.Application()
    app.router.add_get("/api/chat", another_answer)
    served = []
    monkeypatch.setattr(web, "run_app", lambda app, **options: served.append((app, options)))
    stock = web.run_app
    with add_conversations(Options()):
        web.run_app(app, port=1)
    assert web.run_app is stock
    assert served == [(app, {"port": 1})]
    assert [middleware.__self__.__class__ for middleware in app.middlewares] == [Access]
    assert [resource.canonical for resource in app.router.resources()] == ["/api/chat"]
    assert "has no method that answers GET /api/chat" in caplog.text
    assert "no method lm_gen.step of the server" in caplog.text


def test_a_server_of_another_kind_does_not_start_with_a_memory_that_it_would_not_keep(tmp_path):
    with add_conversations(Options(tmp_path / "memory")), pytest.raises(SystemExit) as exit_:
        web.run_app(web.Application())
    assert "has no method that answers GET /api/chat" in str(exit_.value.code)
