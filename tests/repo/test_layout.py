"""The house: which room may use which, no import in a circle, and docs/architecture.md draws all of it."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.support.tiny_repository import ROOT

ROOMS = ("common", "settings", "data", "model", "checkpoint", "training", "evaluation", "doctor", "export")
"""The rooms of `finetune`, each may use those before it."""

TORCH_FREE = ("finetune/common/errors.py", "finetune/common/files.py", "finetune/settings", "moshi_patch/config.py")
"""What `--help` needs: imports neither torch nor moshi."""


def sources() -> dict[str, Path]:
    """Every product module by its dotted name; a package by its folder's."""
    found = {}
    for top in ("finetune", "moshi_patch"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The product's modules that `name` imports, anywhere in its text, also for types alone or inside a function."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin for alias in node.names}
    return {module for module in found if module in known and module != name}


def arrows() -> dict[str, set[str]]:
    known = sources()
    return {name: imports(name, path, known) for name, path in known.items()}


def room(module: str) -> str:
    return module.split(".")[1] if module.startswith("finetune.") else module.split(".")[0]


def test_a_room_uses_only_rooms_that_stand_before_it():
    upwards = [
        f"{name} -> {used}"
        for name, uses in arrows().items()
        for used in uses
        if room(name) in ROOMS and room(used) in ROOMS and ROOMS.index(room(used)) > ROOMS.index(room(name))
    ]
    assert upwards == []


def test_no_import_runs_in_a_circle():
    # The public face of moshi_patch loads its modules when they are asked for; they do not import it back.
    graph = {name: uses for name, uses in arrows().items() if name != "moshi_patch"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_the_arrows_are_seen_at_all():
    found = arrows()
    assert "finetune.training.trainer" in found["finetune.training"] or found["finetune.training.trainer"]
    assert "moshi_patch.ops.dual" in found["moshi_patch.ops"]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_moshi_patch_knows_nothing_of_finetune_and_finetune_only_its_public_face():
    for name, uses in arrows().items():
        if name.startswith("moshi_patch"):
            assert not {used for used in uses if used.startswith("finetune")}, name
        else:
            assert {used for used in uses if used.startswith("moshi_patch")} <= {"moshi_patch"}, name


def test_ops_import_torch_alone():
    for path in (ROOT / "moshi_patch" / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in ("torch", "dataclasses", "collections", "typing"), path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", "math"}, path


def test_every_module_stands_in_a_room():
    rooms = {room(name) for name in sources() if name.startswith("finetune.")}
    assert rooms == set(ROOMS)


def test_a_packages_init_is_its_public_face_alone():
    for name, path in sources().items():
        if path.name == "__init__.py" and name != "moshi_patch":
            body = ast.parse(path.read_text()).body
            allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
            assert all(isinstance(node, allowed) for node in body), name
