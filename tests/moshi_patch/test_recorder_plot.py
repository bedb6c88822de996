"""What is drawn of a recording, by function and by command, and files that are none, refused in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch

import moshi_patch
from moshi_patch.recorder import Recorder, main, plot, read_records
from tests.support.disks import largest_file
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model
from tests.support.recordings import recorded, stream
from tests.support.tiny_repository import ENVIRONMENT, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]


def test_a_row_that_was_not_recorded_is_refused_by_its_number(tmp_path):
    model = tiny_model(**TTT)
    with Recorder(model, tmp_path / "log.jsonl", every=5):
        stream(model, 5, rows=2)
    for row in (2, -1):
        with pytest.raises(ValueError, match=f"row={row}: the recording has rows 0 to 1"):
            plot(read_records(tmp_path / "log.jsonl"), tmp_path / "plot.png", row)


def test_with_the_residual_update_it_says_how_much_was_known_and_draws_it(tmp_path):
    model, log = randomise_targets(tiny_model(**TTT, ttt_update="residual")), tmp_path / "log.jsonl"
    codes = random_codes(model, 2, 1).expand(-1, -1, 12)
    with torch.no_grad(), model.streaming(2), Recorder(model, log, every=3):
        for t in range(12):
            model.forward_text(codes[:, :, t : t + 1])
        stats = moshi_patch.ttt_stats(model)
    reads = read_records(log)[1:]
    for name in stats:
        shares = [read["layers"][name]["known"] for read in reads]
        assert shares[0] == [None, None]
        assert shares[1] + shares[2] == pytest.approx([0.0] * 4, abs=1e-9)
        assert shares[3] == stats[name]["known"]
        assert min(shares[3]) > 0.5
    plot(read_records(log), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = log.read_text().splitlines()
    for broken in ([0.5], ["much", 0.5], 3):
        line = json.loads(lines[1])
        line["layers"][name]["known"] = broken
        log.write_text("\n".join([lines[0], json.dumps(line), lines[2]]))
        with pytest.raises(ValueError, match=r"log\.jsonl:2: "):
            read_records(log)


def test_the_plot_shows_both_norms_of_every_layer_resets_and_chunk_ends(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    model = randomise_targets(tiny_model(**TTT))
    with Recorder(model, tmp_path / "log.jsonl", every=3):
        stream(model, 40, reset_at=23)
    plot(read_records(tmp_path / "log.jsonl"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    labels = drawn[0].axes[0].get_legend_handles_labels()[1]
    assert labels == [*moshi_patch.ttt_gatings(model), "reset", "chunk ends"]
    ends = drawn[0].axes[0].get_lines()[-1].get_xdata()
    assert list(ends) == [5, 10, 15, 20, 28, 33, 38]


def test_the_command_draws(tmp_path):
    command = [sys.executable, "-m", "moshi_patch.recorder", str(recorded(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log.png").is_file()


START = '{"event": "start", "step": 0, "every": 5, "chunk_size": {"a": 5}}\n'
LAYER = '{"position": [1], "updates": [0], "delta_norm": [0.0], "relative_delta": [0.0]}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"loss": 1}\n',
        b"\xff\xfe\n",
        b"[" * 200_000,
        b"5\n" * 3,
        START.replace("5}", '"five"}').encode() * 2,
        (START + '{"event": "read", "step": 1, "layers": 5}\n' + START).encode()[:-9],
        (START + '{"event": "read", "step": 1, "layers": {"a": {"updates": 1}}}\n\n').encode(),
        (START + '{"event": "read", "step": 1, "layers": {"b": ' + LAYER + "}}\n").encode(),
        (START + '{"event": "reset", "step": 1, "rows": "all"}\n\n').encode(),
    ],
    ids=["empty", "other", "bytes", "brackets", "numbers", "size", "no_layers", "layer", "other_layer", "rows"],
)
def test_a_file_that_is_no_recording_is_refused_in_one_line_that_names_it(content, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "other.jsonl")])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "other.jsonl") in line


def test_a_missing_recording_a_full_disk_and_a_senseless_interval_are_one_line_too(tmp_path, capsys):
    log = recorded(tmp_path)
    with pytest.raises(SystemExit), largest_file(1000):
        main([str(log)])
    assert "File too large" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["log.jsonl"]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.jsonl")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.jsonl" in line
    for interval in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit) as end:
            main([str(log), f"--follow={interval}"])
        assert end.value.code == 2
        assert f"--follow: {float(interval)}: must be seconds" in capsys.readouterr().err
