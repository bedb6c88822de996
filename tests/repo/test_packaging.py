"""What is installed is all of it: every package and subpackage is found by the build."""

import re
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[2]


def test_every_subpackage_is_in_the_wheel():
    (patterns,) = re.findall(r"^include = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    found = set(find_packages(str(ROOT), include=re.findall(r'"([^"]+)"', patterns)))
    tops = [ROOT / name for name in ("moshi_patch", "finetune")]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for top in tops for path in top.rglob("__init__.py")}
    folders = {".".join(path.parent.relative_to(ROOT).parts) for top in tops for path in top.rglob("*.py")}
    assert found == packages == folders
    assert {"moshi_patch.ops", "finetune.data"} <= found
