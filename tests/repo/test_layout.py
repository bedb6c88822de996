"""The house: which room may use which, no import in a circle, and docs/architecture.md draws all of it."""

import ast
import graphlib
import re

import pytest

from tests.support.architecture import ENTRY_POINTS, PAGE, ROOMS, ROOT, SERVING, TREES, arrows, fill, modules, room


def test_a_room_uses_only_rooms_that_stand_before_it():
    upwards = [
        f"{name} -> {used}"
        for name, uses in arrows().items()
        for used in uses
        if room(name) in ROOMS and room(used) in ROOMS and ROOMS.index(room(used)) > ROOMS.index(room(name))
    ]
    assert upwards == []


def test_a_room_of_the_server_uses_only_rooms_that_stand_before_it():
    inside = "moshi_patch.serving."
    pairs = [
        (name.removeprefix(inside).split(".")[0], used.removeprefix(inside).split(".")[0])
        for name, uses in arrows().items()
        for used in uses
        if name.startswith(inside) and used.startswith(inside)
    ]
    assert {one for pair in pairs for one in pair} == set(SERVING)
    assert [pair for pair in pairs if SERVING.index(pair[1]) > SERVING.index(pair[0])] == []


def test_no_import_runs_in_a_circle():
    # The public face of moshi_patch loads its modules when they are asked for; they do not import it back.
    graph = {name: uses for name, uses in arrows().items() if name != "moshi_patch"}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle
    assert len(order) >= len(graph) > 100


def test_the_arrows_are_seen_at_all():
    found = arrows()
    assert "finetune.training.build_model" in found["finetune.training.trainer"]
    assert "moshi_patch.kinds.in_place.ops.dual" in found["moshi_patch.kinds.in_place.ops"]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_moshi_patch_knows_nothing_of_finetune_and_finetune_only_its_public_face():
    for name, uses in arrows().items():
        if name.startswith("moshi_patch"):
            assert not {used for used in uses if used.startswith("finetune")}, name
        else:
            assert {used for used in uses if used.startswith("moshi_patch")} <= {"moshi_patch"}, name


def test_the_ops_of_every_kind_import_torch_alone():
    paths = list((ROOT / "moshi_patch" / "kinds").glob("*/ops/*.py"))
    assert len(paths) > 8
    for path in [*paths, ROOT / "moshi_patch" / "kinds" / "rows.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in ("torch", "dataclasses", "collections", "typing"), path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", "math"}, path


def test_no_kind_of_memory_uses_another():
    kinds = {path.parent.name for path in (ROOT / "moshi_patch" / "kinds").glob("*/ops")}
    for name, uses in arrows().items():
        if name.startswith("moshi_patch.kinds.") and name.split(".")[2] in kinds:
            others = {used for used in uses if used.startswith("moshi_patch.kinds.") and used.split(".")[2] in kinds}
            assert {used.split(".")[2] for used in others} <= {name.split(".")[2]}, name
            if ".ops" in name:
                assert {used for used in uses if ".ops" not in used} <= {"moshi_patch.kinds.rows"}, name


def test_no_file_has_more_than_300_lines_and_no_function_more_than_60():
    paths = [path for top in TREES for path in (ROOT / top).rglob("*.py")] + [ROOT / name for name in ENTRY_POINTS]
    assert len(paths) > 200
    for path in paths:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_every_module_of_finetune_stands_in_a_room():
    assert {room(name) for name in modules() if name.startswith("finetune.")} == set(ROOMS)


def test_a_packages_init_is_its_public_face_alone():
    for name, path in modules().items():
        if path.name == "__init__.py" and name != "moshi_patch":
            body = ast.parse(path.read_text()).body
            allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
            assert all(isinstance(node, allowed) for node in body), name


def test_the_page_draws_the_house_as_it_is():
    assert PAGE.read_text() == fill(PAGE.read_text()), "run `python -m tests.support.architecture`"


def test_what_the_walks_and_the_table_name_is_there():
    named = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", PAGE.read_text())
    assert len(named) > 30
    for file, symbol in named:
        text = (ROOT / file).read_text()
        for part in symbol.split(".") if symbol else ():
            assert re.search(rf"(def|class) {part}\b|^{part}\b", text, re.M), f"{file}:{symbol}"
    for test in re.findall(r"`(tests/[\w/]+)`", PAGE.read_text()):
        assert (ROOT / test).exists(), test
