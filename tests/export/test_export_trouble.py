"""An export on a full disk, or one that is killed, leaves nothing that looks like an export."""

import os
import signal
import subprocess
import sys
import time

import pytest

from finetune.export.__main__ import main
from tests.support.disks import largest_file
from tests.support.tiny_repository import ENVIRONMENT, ROOT


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("size", [0, 2_000, 300_000, 600_000, 1_200_000], ids="{} bytes".format)
@pytest.mark.parametrize("way", ["--merge", "--with-base"])
def test_a_full_disk_is_one_line_whichever_file_does_not_fit(saved_run, tmp_path, capsys, way, size):
    run = saved_run("adapter")  # which may be trained only now, while there is room
    with largest_file(size):
        code = main([str(run), str(tmp_path / "out"), way])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python")]
    assert code == 1
    assert f"{tmp_path / 'out'}: cannot be made (" in line
    assert "too large" in line.lower()
    assert os.listdir(tmp_path) == []


def test_a_killed_export_leaves_a_folder_of_another_name_and_the_next_one_succeeds(saved_run, tmp_path, patched):
    """Killed by itself, while it writes the weights: the one moment that a test could miss otherwise."""
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, signal, sys\n"
        "from finetune.export import export\n"
        "from finetune.export.__main__ import main\n"
        "stock = export.shutil.copyfile\n"
        "def copy(source, to):\n"
        "    to.write_bytes(source.read_bytes()[:1000])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.shutil.copyfile = copy\n"
        "main(sys.argv[1:])\n"
    )
    run, out = saved_run("full"), tmp_path / "out"
    done = subprocess.run([sys.executable, killer, run, out], cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left.name.startswith(".tmp-out-")
    assert main([str(run), str(out)]) == 0


@pytest.mark.usefixtures("patched")
def test_what_is_printed_serves_the_export_on_this_machine_as_it_is_printed(saved_run, tmp_path, capsys):
    out = tmp_path / "it's mine"
    assert main([str(saved_run("full")), str(out)]) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Serve it: ")]
    command = command.removeprefix("Serve it: ")
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            f"exec {command} --port 0", shell=True, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while "Access the" not in log.read_text() and time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        assert "Access the" in log.read_text(), log.read_text()
    finally:
        server.kill()
        server.wait()
