"""The evidence suite: grids refused by name, runs that outlast a cut file or a divergence, a page that is its data."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from benchmarks.evidence import runner, suite
from benchmarks.evidence.grid import Cell, Run, ordered_runs, read_grid
from benchmarks.evidence.model import build_model
from benchmarks.evidence.report.blocks import BLOCKS
from benchmarks.evidence.report.page import render
from benchmarks.evidence.results import Results
from benchmarks.evidence.settings import Settings
from benchmarks.evidence.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

SMALL = {"steps": 2, "batch": 2, "eval_batch": 4, "width": 16, "heads": 2, "gap_max": 20}


def cell(
    name: str = "a", priority: int = 1, seeds: tuple[int, ...] = (0,), vary: dict | None = None, **settings
) -> Cell:
    return Cell(name, priority, seeds, SMALL | settings, vary or {})


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cells: []\nbudget: 3\n", "the grid: unknown key 'budget'"),
        ("settings: {}\n", "'cells' is missing"),
        ("cells: [", "grid.yaml: while parsing"),
        ("cells: 3\n", "cells: must be a list, not 3"),
        ("cells: [{name: a, priority: 1, seeds: [0], settings: {gaps: 3}}]\n", "cell 'a'"),
        ("cells: [{name: a, priority: 1, seeds: [0], settings: {ttt: {chunk: 3}}}]\n", "ttt: 'chunk': no further"),
        ("settings: {stepz: 1}\ncells: []\n", "settings: unknown key 'stepz'"),
        ("cells: [{name: a, priority: 1, seeds: [0], sedes: 1}]\n", "cell 1: unknown key 'sedes'"),
        ("cells: [{name: a, priority: 1}]\n", "cell 1: 'seeds' is missing"),
        ("cells: [{name: a, priority: 1, seeds: [0], settings: {chunks: 1}}]\n", "'a', settings: unknown key 'chunks'"),
        ("cells: [{name: a, priority: 1, seeds: [0], vary: {eta: [1]}}]\n", "'a', vary: unknown key 'eta'"),
        ("cells: [{name: a, priority: 1, seeds: [0], vary: {rate: 1}}]\n", "'a', vary, rate: must be a list"),
        ("cells: [{name: a, priority: 1, seeds: 3}]\n", "'a', seeds: must be a list of whole numbers"),
        ("cells: [{name: a, priority: 1, seeds: [0], vary: {task: [recal]}}]\n", "cell 'a': task='recal'"),
        ("cells: [{name: a, priority: 1, seeds: [0], settings: {part: 4}}]\n", "attention reaches 30"),
        ("cells: [{name: a, priority: 1, seeds: [0], settings: {task: assoc}}]\n", "14 pairs"),
        ("cells: [{name: a, priority: 1, seeds: [0]}, {name: a, priority: 1, seeds: [0]}]\n", "used 2 times"),
    ],
)
def test_a_grid_with_a_mistake_is_refused_by_name_before_anything_runs(tmp_path, text, named, capsys):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=r"grid\.yaml") as error:
        read_grid(path)
    assert named in str(error.value)
    out = tmp_path / "runs.jsonl"
    assert suite.main(["--grid", str(path), "--results", str(out)]) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_the_first_seed_of_every_cell_comes_before_the_second_of_any_and_priority_before_both():
    runs = ordered_runs(
        [cell("late", 2, (0, 1)), cell("a", 1, (0, 1), {"chunk": [4, 8]}), cell("b", 1, (5,), rate=0.5)]
    )
    order = [(run.cell, run.settings.seed, run.settings.chunk) for run in runs]
    assert order == [("a", 0, 4), ("a", 0, 8), ("b", 5, 16), ("a", 1, 4), ("a", 1, 8), ("late", 0, 16), ("late", 1, 16)]


def test_a_run_that_two_cells_share_is_run_once():
    assert len(ordered_runs([cell("a"), cell("b", vary={"chunk": [16, 8]})])) == 2


def test_the_id_depends_on_every_setting():
    changed = {"pairs": (2,), "stream": "own", "decay": 0.5, "seed": 1, "audio": "random", "clip": 1.0}
    changed |= {"echo": 0, "returns": False, "text_lr": 0.1, "targets_first": 5, "gaps": (1,)}
    ids = {dataclasses.replace(Settings(), **{key: value}).id for key, value in changed.items()}
    assert len({*ids, Settings().id}) == len(changed) + 1


def test_a_setting_that_came_later_changes_no_earlier_run():
    plain = Settings()
    assert plain.id == "085f89feaf9f", "identifiers of committed results must stay"
    assert not {"echo", "measure_every", "ttt"} & set(plain.as_dict())
    assert Settings(echo=0).as_dict()["echo"] == 0


def test_a_further_argument_of_ttt_that_there_is_not_or_that_has_a_name_here_is_refused():
    with pytest.raises(ValueError, match=r"ttt: 'decay': .*set 'decay' instead"):
        Settings(ttt={"decay": 0.5})
    with pytest.raises(ValueError, match="ttt: 'dekay': no further argument of TTT"):
        Settings(ttt={"dekay": 0.5})


def test_a_line_says_everything_about_its_run():
    line = json.loads(json.dumps(runner.execute(Run("a", 1, Settings(**SMALL, sweep=True)))))
    assert (line["status"], line["cell"], line["settings"]["chunk"]) == ("ok", "a", 16)
    assert Settings(**line["settings"]).id == line["id"]
    assert list(line["final"]) == ["on", "off"]
    for condition in line["final"].values():
        assert set(condition) == {"", *(f"gap {windows}" for windows in (1, 2, 4, 8, 12, 16))}
        assert set(condition[""]) == {"first", "within", "beyond"}
        assert all(2 < mark["nats"] < 6 and 0 <= mark["hits"] <= 1 for mark in condition[""].values())
    assert line["training"]["peak_bytes"] > 10_000
    assert line["seconds"] >= line["training"]["seconds"] > 0
    assert {"cpu", "torch", "moshi", "date"} <= set(line["machine"])


def test_a_stock_model_has_one_condition():
    line = runner.execute(Run("a", 1, Settings(**SMALL, model="none")))
    assert list(line["final"]) == ["none"]


def test_what_is_done_is_not_done_again(tmp_path):
    path, cells = tmp_path / "runs.jsonl", [cell(seeds=(0, 1))]
    assert len(runner.run_all(cells, Store(path))["executed"]) == 2
    before = path.read_text()
    assert runner.run_all(cells, Store(path)) == {"executed": [], "left_out": []}
    assert path.read_text() == before


def test_a_cut_line_is_named_kept_aside_and_its_run_repeated(tmp_path, caplog):
    path, cells = tmp_path / "runs.jsonl", [cell(seeds=(0, 1))]
    runner.run_all(cells, Store(path))
    whole = path.read_text()
    path.write_text(whole[:-100])
    with caplog.at_level(logging.WARNING):
        store = Store(path)
    assert "runs.jsonl, line 2" in caplog.text
    assert (tmp_path / "runs.jsonl.broken").read_text() == whole[:-100].splitlines()[1] + "\n"
    assert [run.settings.seed for run in runner.run_all(cells, store)["executed"]] == [1]
    again = Store(path).runs
    assert [run["final"] for run in again.values()] == [json.loads(line)["final"] for line in whole.splitlines()]


def test_a_file_that_lost_its_last_line_break_takes_the_next_run_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"id": "x", "status": "ok"}')
    Store(path).add({"id": "y", "status": "ok"})
    assert list(Store(path).runs) == ["x", "y"]


def test_fresh_keeps_the_old_results_aside(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"id": "x", "status": "ok"}\n')
    assert Store(path, fresh=True).runs == {}
    assert "x" in (tmp_path / "runs.jsonl.old").read_text()


def test_a_run_that_diverges_is_recorded_and_the_rest_goes_on(tmp_path):
    cells = [cell("wild", lr=1e30, steps=4), cell("tame", 2)]
    store = Store(tmp_path / "runs.jsonl")
    runner.run_all(cells, store)
    wild, tame = Store(store.path).runs.values()
    assert (wild["status"], tame["status"]) == ("diverged", "ok")
    assert "at step" in wild["message"]
    assert store.is_done(wild["id"]), "it would diverge again"
    assert "wild" in BLOCKS["bookkeeping"](Results(cells, store.runs))


def test_a_run_that_fails_is_recorded_the_rest_goes_on_and_it_is_tried_again(tmp_path):
    cells = [cell("odd", width=18, heads=4), cell("even", 2)]
    store = Store(tmp_path / "runs.jsonl")
    runner.run_all(cells, store)
    odd, even = store.runs.values()
    assert (odd["status"], even["status"]) == ("error", "ok")
    assert not store.is_done(odd["id"])


def test_a_budget_leaves_out_what_does_not_fit_and_the_page_says_so(tmp_path, monkeypatch):
    cells, store = [cell("cheap"), cell("dear", 2, steps=3)], Store(tmp_path / "runs.jsonl")
    monkeypatch.setattr(runner, "probed_seconds", lambda settings: 1e3 if settings.steps == 3 else 0.0)
    done = runner.run_all(cells, store, budget=100)
    assert [run.cell for run in done["executed"]] == ["cheap"]
    assert [run.cell for run in done["left_out"]] == ["dear"]
    assert "`dear` 1" in BLOCKS["bookkeeping"](Results(cells, store.runs))


def test_a_budget_that_is_spent_asks_no_run_how_long_it_would_take(tmp_path, monkeypatch):
    asked: list[Settings] = []
    monkeypatch.setattr(runner, "probed_seconds", lambda settings: asked.append(settings) or 1e3)
    done = runner.run_all([cell(seeds=(0, 1, 2))], Store(tmp_path / "runs.jsonl"), budget=1e-9)
    assert len(done["left_out"]) == 3
    assert asked == []


def test_a_budget_that_outlasts_the_grid_goes_into_further_seeds(tmp_path, monkeypatch):
    store = Store(tmp_path / "runs.jsonl")
    monkeypatch.setattr(runner, "probed_seconds", lambda settings: 0.0)
    runner.run_all([cell()], store, budget=4.0)
    seeds = [run["settings"]["seed"] for run in store.runs.values()]
    assert seeds == list(range(len(seeds)))
    assert len(seeds) > 1


def test_a_run_is_expected_to_take_what_it_took_with_another_seed():
    settings = Settings(**SMALL)
    done = [{"settings": dataclasses.replace(settings, seed=4).as_dict(), "seconds": 12.5}]
    assert runner.expected_seconds(settings, done) == 12.5
    assert runner.expected_seconds(dataclasses.replace(settings, chunk=8), done) < 12


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1m", 60), ("4h", 14400), ("0.5h", 1800)])
def test_a_budget_is_read(text, seconds):
    assert suite.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "-1m", "0s", "1d"])
def test_a_budget_that_means_nothing_is_named(text):
    with pytest.raises(ValueError, match=r"--budget .*30m"):
        suite.parse_budget(text)


def committed(grid: str) -> Results:
    file = suite.RESULTS / f"{suite.PAGES[grid].results or grid}.jsonl"
    lines = map(json.loads, file.read_text().splitlines())
    return Results(read_grid(suite.GRIDS / f"{grid}.yaml"), {line["id"]: line for line in lines})


@pytest.mark.parametrize("grid", suite.PAGES)
def test_a_page_is_what_its_results_say(grid):
    for file in suite.PAGES[grid].files:
        page = file.read_text()
        assert render(page, committed(grid)) == page, f"run python -m benchmarks.evidence --grid {grid} --report-only"


def test_every_table_is_on_a_page():
    text = "".join(file.read_text() for page in suite.PAGES.values() for file in page.files)
    assert all(f"<!-- {name} -->" in text for name in BLOCKS)


def test_a_table_nobody_knows_is_named():
    with pytest.raises(ValueError, match="<!-- hedline -->"):
        render("<!-- hedline -->\n<!-- end hedline -->", Results([], {}))


def test_a_table_that_would_be_filled_once_of_two_times_is_refused():
    with pytest.raises(ValueError, match="<!-- headline -->: stands 2 times"):
        render(2 * "<!-- headline -->\n<!-- end headline -->", Results([], {}))


@pytest.mark.parametrize("grid", suite.PAGES)
def test_the_committed_results_belong_to_the_committed_grid(grid):
    results = committed(grid)
    known = {dataclasses.replace(run.settings, seed=0).id for run in ordered_runs(results.cells)}
    for line in results.lines.values():
        settings = Settings(**line["settings"])
        assert settings.id == line["id"]
        assert dataclasses.replace(settings, seed=0).id in known


def test_the_whole_command_runs_reports_and_resumes(tmp_path):
    grid = written(
        tmp_path,
        f"settings: {json.dumps(SMALL)}\n"
        "cells:\n  - {name: recall, priority: 1, seeds: [0, 1], settings: {sweep: true}, vary: {model: [none, ttt]}}\n",
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- headline -->\nold\n<!-- end headline -->\nafter\n")
    command = ["--grid", grid, "--results", tmp_path / "r.jsonl", "--doc", page, "--plots", tmp_path / "plots"]
    command = [str(part) for part in [*command, "--cache", tmp_path / "cache"]]
    assert suite.main(command) == 0
    first = page.read_text()
    assert first.startswith("before\n<!-- headline -->\n| nats")
    assert first.endswith("<!-- end headline -->\nafter\n")
    assert (tmp_path / "plots" / "evidence_memory.png").read_bytes().startswith(b"\x89PNG")
    assert suite.main([*command, "--report-only"]) == 0
    assert page.read_text() == first


def test_a_grid_of_ones_own_is_reported_beside_its_results_and_not_on_a_committed_page(tmp_path):
    grid = written(tmp_path, "cells: [{name: recall, priority: 1, seeds: [0]}]\n")
    before = suite.PAGES["evidence"].file.read_bytes()
    assert suite.main(["--grid", str(grid), "--report-only"]) == 0
    assert "No run yet." in (tmp_path / "grid.md").read_text()
    assert suite.PAGES["evidence"].file.read_bytes() == before


@pytest.mark.parametrize("words", [["--grid", "no_such_grid"], ["--budget", "3"]])
def test_a_command_that_cannot_be_run_ends_in_one_line(words, capsys):
    assert suite.main([*words, "--report-only"]) > 0
    assert capsys.readouterr().err.count("\n") == 1


def test_the_state_that_the_longer_window_is_measured_against_is_what_a_stream_allocates():
    settings = Settings(chunk=8)
    model = build_model(settings)
    with model.streaming(1):
        fast = model.transformer.layers[0].gating._streaming_state.fast
        held = sum(getattr(fast, name).numel() for name in ("delta", "keys", "values"))
    longer = dataclasses.replace(settings, equal_bytes=True)
    assert longer.context == settings.window + held // (2 * settings.width)
    assert build_model(dataclasses.replace(longer, model="none")).context == longer.context
