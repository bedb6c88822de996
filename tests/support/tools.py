"""Shared by the tests that need a program which pip does not install: how to find it, and what is said without it."""

import importlib.util
import os
import shutil

import pytest

NOT_SET_UP = "not set up here: "
"""How the reason of every such skip begins; `tests/conftest.py` shows them at the end of a run."""

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Its command, or None; `CHROMIUM` in the environment names another one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def find_haproxy() -> str | None:
    """Its command, or None. Debian has it where a user's PATH does not look."""
    return shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")


def _needs(what: str, there: object) -> pytest.MarkDecorator:
    reason = f"{NOT_SET_UP}{what}. `make browsers` as root installs Debian's chromium and haproxy"
    return pytest.mark.skipif(not there, reason=reason)


needs_chromium = _needs(
    "Chromium and playwright, to test the page", find_chromium() and importlib.util.find_spec("playwright")
)
needs_haproxy = _needs("HAProxy, to test several servers behind it", find_haproxy())
