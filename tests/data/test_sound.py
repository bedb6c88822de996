"""Data: far too loud, silent where words are spoken, both channels the same: `check` names it, a run warns of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.common.distributed import cleanup, setup
from finetune.data.__main__ import main as data_main
from finetune.data.sample import MAX_SEGMENTS, look_at_sample
from finetune.data.segments import Cutter, Listing
from finetune.data.sound import LOUD, ONE_CHANNEL, SILENT_WORDS, SoundMeter
from finetune.settings.record import from_dict
from finetune.training.open_data import check_data
from tests.support.audio_files import RATE, noise, write_wav
from tests.support.datasets import MAIN, USER, write_dataset
from tests.support.training_runs import settings_for

WORDS = [(f"w{i}", (0.1 * i, 0.1 * i + 0.05), MAIN if i % 2 else USER) for i in range(40)]


def faults(pcm: np.ndarray, words=WORDS, start: float = 0.0) -> dict[str, str]:
    meter = SoundMeter(RATE, start)
    meter.add(pcm)
    return meter.faults(words)


def scaled(factor: float) -> np.ndarray:
    return noise(50) * np.float32(factor / np.abs(noise(50)).max())


def test_speech_on_both_channels_has_no_faults():
    assert faults(noise(50)) == {}
    assert faults(np.zeros((2, RATE), "f"), []) == {}  # nobody says anything
    assert faults(noise(0)) == {}


@pytest.mark.parametrize(("peak", "loud"), [(1.0, False), (1.5, False), (2.5, True), (32768.0, True)])
def test_samples_far_outside_of_their_range_are_too_loud(peak, loud):
    found = faults(scaled(peak))
    assert set(found) == ({LOUD} if loud else set())
    assert not loud or f"samples up to {peak:.3g}" in found[LOUD]


@pytest.mark.parametrize(("share", "same"), [(0.0, True), (0.002, True), (0.05, False), (1.0, False)])
def test_channels_that_hardly_differ_are_one_recording_twice(share, same):
    left, right = noise(50, channels=1), noise(50, channels=1, seed=1)
    found = faults(np.concatenate([left, (1 - share) * left + share * right]))
    assert set(found) == ({ONE_CHANNEL} if same else set())


@pytest.mark.parametrize(("side", "said"), [(0, "by SPEAKER_MAIN are spoken while the left"), (1, "by other speakers")])
def test_words_on_a_silent_channel_are_counted(side, said):
    pcm = noise(50)
    pcm[side] *= 1e-3
    found = faults(pcm)
    assert set(found) == {SILENT_WORDS}
    assert found[SILENT_WORDS].startswith("20 of 20 words ")
    assert said in found[SILENT_WORDS]


@pytest.mark.parametrize(("seconds", "named"), [(0.5, False), (2.0, True)])
def test_a_few_words_may_be_silent(seconds, named):
    pcm = noise(50)
    pcm[0, : int(seconds * RATE)] = 0  # of 4 seconds
    assert (SILENT_WORDS in faults(pcm)) is named


def test_a_part_of_a_file_is_asked_for_its_own_words_alone():
    pcm = noise(50)
    pcm[:, : 2 * RATE] = 0
    assert faults(pcm[:, 2 * RATE :], start=2.0) == {}
    assert set(faults(pcm[:, : 2 * RATE])) == {SILENT_WORDS}


def test_parts_are_measured_as_the_whole():
    pcm = noise(50)
    pcm[1, RATE:] = pcm[0, RATE:] * 1e-3
    whole, parts = SoundMeter(RATE), SoundMeter(RATE)
    whole.add(pcm)
    for first in range(0, pcm.shape[1], RATE):
        parts.add(pcm[:, first : first + RATE])
    assert parts.faults(WORDS) == whole.faults(WORDS) != {}
    assert (parts.samples, parts.seconds) == (whole.samples, 4.0)


ODD = {LOUD: lambda: scaled(100.0), ONE_CHANNEL: lambda: noise(20)[[0, 0]], SILENT_WORDS: lambda: noise(20) * 1e-4}


def odd_dataset(folder: Path, number: int, odd: int, kind: str) -> Path:
    path = write_dataset(folder, number, steps=20)
    for index in range(odd):
        write_wav(folder / f"train{index}.wav", ODD[kind]()[:, : 20 * 1920])
    return path


@pytest.mark.parametrize("kind", ODD)
def test_check_names_them(tmp_path, capsys, kind):
    path = odd_dataset(tmp_path, 3, 1, kind)
    assert data_main(["check", str(path), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["kind"], problem["line"]) == (kind, 1)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(("number", "odd"), [(10, 3), (2 * MAX_SEGMENTS, 2 * MAX_SEGMENTS)])
def test_a_sample_warns_once_of_each_kind_with_its_numbers(tmp_path, codec, kind, number, odd):
    cutter = Cutter(1.6, 12.5)
    listing = Listing(str(odd_dataset(tmp_path, number, odd, kind)), cutter)
    sampled = look_at_sample(listing, cutter, codec[1], (3, 0))
    (warning,) = sampled.warnings
    assert sampled.refusals == []
    counts = f"{kind} in {min(odd, MAX_SEGMENTS)} of {min(number, MAX_SEGMENTS)} segments that were listened to"
    assert warning.startswith(
        f"{tmp_path / 'train.jsonl'}: {counts}. The first: {tmp_path / 'train0.wav'} from step 0: "
    )


def test_training_warns_of_them_before_a_model_is_loaded(tmp_path, ttt_repo, caplog):
    paths = {key: str(odd_dataset(tmp_path / key, 3, 2, ONE_CHANNEL)) for key in ("train_data", "eval_data")}
    args = from_dict(settings_for(ttt_repo, tmp_path / "run", data=paths, do_eval=True, duration_sec=1.6))
    ctx = setup()
    try:
        check_data(args, ctx)
    finally:
        cleanup()
    assert [message.split(" segments")[0] for message in caplog.messages] == [
        f"{path}: both channels are the same in 2 of 3" for path in paths.values()
    ]


def test_a_sample_of_good_data_says_nothing_and_leaves_out_what_is_broken(tmp_path, codec):
    path = write_dataset(tmp_path, 20, steps=20, train1="malformed")
    (tmp_path / "train2.wav").write_bytes(b"nonsense")
    cutter = Cutter(1.6, 12.5)
    sampled = look_at_sample(Listing(str(path), cutter), cutter, codec[1], (3, 0))
    assert (sampled.refusals, sampled.warnings) == ([], [])
