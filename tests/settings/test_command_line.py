"""Every program's help shows each of its keys at once; every command line ends in a value, a help or one line."""

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import fields

import pytest
from simple_parsing.docstring import get_attribute_docstring

import moshi_ttt
from finetune.common import program as program_module
from finetune.common.errors import ConfigError
from finetune.settings.command_line import SettingsParser, parse
from finetune.settings.commands import CheckArgs, DoctorArgs, ExportArgs
from finetune.settings.evaluation import EvalArgs
from finetune.settings.limits import settings_of
from finetune.settings.schema import TrainArgs
from moshi_patch.serving.stock.options import server_options
from tests.support.tiny_repository import ENVIRONMENT, ROOT

SCHEMAS = {
    "finetune.training.__main__": TrainArgs,
    "finetune.evaluation.__main__": EvalArgs,
    "finetune.doctor.__main__": DoctorArgs,
    "finetune.export.__main__": ExportArgs,
    "finetune.data.__main__": CheckArgs,
}
PROGRAMS = [module for module, _ in moshi_ttt.COMMANDS.values()]


def keys(cls: type) -> dict[str, str]:
    """The help of each key of a schema, as it stands below its field."""
    sections = {"": cls} | {f"{field.name}.": field.type for field in fields(cls) if hasattr(field.type, "__mro__")}
    sections = {name: one for name, one in sections.items() if hasattr(one, "__dataclass_fields__")}
    return {
        f"{section}{field.name}": get_attribute_docstring(one, field.name).docstring_below
        for section, one in sections.items()
        for field in fields(one)
        if not hasattr(field.type, "__dataclass_fields__")
    }


@pytest.mark.parametrize(("module", "cls"), SCHEMAS.items(), ids=SCHEMAS)
def test_the_help_shows_every_key_with_its_meaning_default_and_range(module, cls, capsys):
    assert importlib.import_module(module).main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key, meaning in keys(cls).items():
        assert len(meaning) > 10, key
        assert " ".join(meaning.split()) in shown, key
        assert f"--{key} " in shown or f"--{key.replace('_', '-')} " in shown or key.upper() in shown
    if cls is TrainArgs:
        for part in ("(default: 100; a whole number from 1 to 1e+09)", "(default: 3; a whole number", "or null)"):
            assert part in shown
        assert "(default: bfloat16; one of bfloat16, float32, float16)" in shown


def test_the_help_of_the_runner_shows_the_options_that_it_adds(capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module("moshi_patch.__main__").main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert {"--memory", "--idle-timeout"} <= server_options()
    for name in (*server_options(), "MODULE", "(default: 30)", "OMP_NUM_THREADS", "NO_TORCH_COMPILE"):
        assert name in shown


@pytest.mark.parametrize("cls", SCHEMAS.values(), ids=lambda cls: cls.__name__)
def test_every_number_has_a_range_that_its_default_is_in(cls):
    if any(field.metadata.get("positional") for field in fields(cls)):
        return
    for key, field, value in settings_of(cls()):
        if key.startswith("lora.") and cls is EvalArgs:
            continue  # read from the checkpoint
        if {int, float} & {field.type, *getattr(field.type, "__args__", ())} and key != "ttt.layers":
            assert field.metadata["holds"](value), key
            for absurd in (-(10.0**30), 10.0**30, float("nan"), float("inf")):
                assert not field.metadata["holds"](absurd), key


def test_help_comes_at_once_without_torch_or_moshi():
    code = (
        "import contextlib, importlib, io, json, sys, time\n"
        "seconds = []\n"
        f"for module in {PROGRAMS!r}:\n"
        "    before = time.process_time()\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        importlib.import_module(module).main(['--help'])\n"
        "    seconds.append(time.process_time() - before)\n"
        "print(json.dumps([max(seconds), sorted({'torch', 'moshi', 'numpy'} & sys.modules.keys())]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=60)
    slowest, loaded = json.loads(done.stdout)
    assert loaded == []
    assert slowest < 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run"], DoctorArgs("run")),
        ([], DoctorArgs()),
        (["--json", "run"], DoctorArgs("run", json=True)),
        (["--base=b", "run", "--device", "cuda:1"], DoctorArgs("run", "b", "cuda:1")),
        (["--base", "null"], DoctorArgs()),
    ],
)
def test_commands_with_arguments_and_flags(argv, expected):
    assert parse(DoctorArgs, argv, "doctor", "[CHECKPOINT]") == expected


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["a"], "required: OUT"),
        (["a", "b", "c"], "unrecognized arguments: c"),
        (["a", "b", "--with_base"], "--with_base: unknown option; did you mean --with-base?"),
        (["a", "b", "--with-bas"], "--with-bas: unknown option; did you mean --with-base?"),
        (["a", "b", "--merge=1"], "--merge"),
        (["a", "b", "--base"], "base: needs a value"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(argv, named):
    with pytest.raises(ConfigError) as error:
        parse(ExportArgs, argv, "export", "CHECKPOINT OUT")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["-1", "-x", "a b", "=", "---", "a=b", "", "[", "%s", "@file"])
def test_a_value_may_be_any_text(value):
    assert SettingsParser(TrainArgs, "p", "").given([f"--run_dir={value}"]) == {"run_dir": value}
    if not value.startswith("--"):  # which would be the next option
        assert SettingsParser(TrainArgs, "p", "").given(["--run_dir", value]) == {"run_dir": value}


def test_an_old_python_is_told_so_in_one_line(monkeypatch, capsys):
    @program_module.program("train.py")
    def main(argv, prog):
        pytest.fail("it was run")

    monkeypatch.setattr(program_module.sys, "version_info", (3, 9, 1))
    assert main([]) == 2
    assert capsys.readouterr().err == "train.py: needs Python 3.10 or newer; this is Python 3.9.1.\n"


def test_what_an_old_python_reads_before_that_line_is_written_for_it():
    files = [ROOT / name for name in ("train.py", "eval_from_checkpoint.py", "moshi_ttt.py", "moshi_patch/__init__.py")]
    files += [ROOT / "finetune" / "common" / name for name in ("program.py", "errors.py")]
    files += [ROOT / "finetune" / "__init__.py", *(ROOT / "finetune").glob("*/__init__.py")]
    mains = list((ROOT / "finetune").glob("*/__main__.py"))
    assert len(mains) == 5
    for path in files + mains:
        tree = ast.parse(path.read_text(), feature_version=(3, 7))
        used = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
        assert path not in mains or used == {"common.program"}, path


def test_a_package_that_is_not_installed_is_named(capsys):
    @program_module.program("train.py")
    def main(argv, prog):
        import not_installed_anywhere  # noqa: F401

    assert main([]) == 1
    assert capsys.readouterr().err.startswith("train.py: needs the package 'not_installed_anywhere'; `pip install .`")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_too_little_memory_is_one_line_and_other_errors_keep_their_traceback(error, capsys):
    @program_module.program("train.py")
    def main(argv, prog):
        raise error if not argv else RuntimeError("another error")

    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: out of memory (")
    with pytest.raises(RuntimeError, match="another error"):
        main(["x"])
