"""Recordings as a stream of Moshi's own speech, and what happens to those that cannot be used."""

import json
import math

import numpy as np
import pytest
import sphn
import torch

from example.make_pairs import make_list, play
from finetune.common.errors import ConfigError
from finetune.data.broken import BrokenData, BrokenItem
from finetune.evaluation.published.audio import MonoTokenizer
from tests.support.published import evaluate, model_of, settings
from tests.support.tiny_repository import ROOT

pytestmark = pytest.mark.usefixtures("patched")


def test_the_speech_is_moshis_and_the_user_is_silent(mimi):
    model = model_of(0)
    tokenizer = MonoTokenizer.for_model(model, mimi)
    pcm = play(np.array([1, 5, 2]), "A", 24_000)
    codes = tokenizer.codes(pcm)
    steps = math.ceil(len(pcm) / mimi.frame_size)
    with torch.no_grad():
        spoken, silent = mimi.encode(torch.tensor(np.stack([pcm, np.zeros_like(pcm)]))[:, None])
    assert codes.shape == (1, 1 + model.n_q, steps + max(model.delays))
    assert (codes[0, 0, :steps] == model.text_padding_token_id).all()
    assert torch.equal(codes[0, 1 : 1 + model.dep_q, :steps], spoken[: model.dep_q])
    assert torch.equal(codes[0, 1 + model.dep_q :, :steps], silent[: model.n_q - model.dep_q])
    assert (codes[..., steps:] == model.zero_token_id).all()


def test_a_recording_at_another_rate_is_heard_as_the_same(mimi, tmp_path):
    tokenizer = MonoTokenizer.for_model(model_of(0), mimi)
    for rate in (16_000, 24_000):
        sphn.write_wav(str(tmp_path / f"{rate}.wav"), play(np.array([0, 2, 1, 3]), "A", rate), rate)
    low, high = (tokenizer(tmp_path / f"{rate}.wav") for rate in (16_000, 24_000))
    assert low.shape == high.shape
    assert (low[0, 1] == high[0, 1]).float().mean() > 0.5  # of 64 codes each; 16 kHz has less of the high harmonics


def break_files(folder, pairs):
    """`pairs` good pairs and one with a broken recording of each kind; returns what must be said of them."""
    make_list(folder, np.random.default_rng(5), pairs, 2)
    audio = folder / "audio"
    whole = (audio / "0000_good.wav").read_bytes()
    (audio / "empty.wav").write_bytes(b"")
    (audio / "cut.wav").write_bytes(whole[:6000])
    (audio / "header.wav").write_bytes(whole[:44])
    stereo = (ROOT / "example" / "data" / "boat.wav").read_bytes()
    (audio / "stereo.wav").write_bytes(stereo)
    said = {"empty": "no suitable format", "cut": "cut off after", "header": "no audio", "stereo": "2 channels"}
    said["missing"] = "No such file"
    with (folder / "pairs.jsonl").open("a") as file:
        for name in said:
            line = {"id": name, "correct": "audio/0000_good.wav", "incorrect": f"audio/{name}.wav"}
            file.write(json.dumps(line) + "\n")
    return said


def test_recordings_that_cannot_be_used_are_named(mimi, tmp_path):
    tokenizer = MonoTokenizer.for_model(model_of(0), mimi)
    for name, message in break_files(tmp_path, 1).items():
        with pytest.raises(BrokenItem, match=rf"{name}\.wav.*{message}"):
            tokenizer(tmp_path / "audio" / f"{name}.wav")


def test_a_few_broken_pairs_are_skipped_by_name_and_counted(mimi, tmp_path):
    broken = break_files(tmp_path, 95)
    result = evaluate(model_of(0), mimi, tmp_path / "store", settings(swuggy=str(tmp_path / "pairs.jsonl")))["swuggy"]
    assert result["pairs"] == 95
    assert len(result["skipped"]) == 5
    for name in broken:
        assert any(f"{name}.wav" in reason for reason in result["skipped"])


def test_a_header_without_a_rate_is_one_skipped_recording_and_not_the_end(mimi, tmp_path):
    make_list(tmp_path, np.random.default_rng(5), 19, 2)
    damaged = bytearray((tmp_path / "audio" / "0000_good.wav").read_bytes())
    damaged[24:28] = bytes(4)  # samples per second
    (tmp_path / "audio" / "damaged.wav").write_bytes(damaged)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        line = {"id": "damaged", "correct": "audio/0000_good.wav", "incorrect": "audio/damaged.wav"}
        file.write(json.dumps(line) + "\n")
    args = settings(swuggy=str(tmp_path / "pairs.jsonl"), longform=str(tmp_path / "audio"))
    found = evaluate(model_of(0), mimi, tmp_path / "store", args)
    for result in found.values():
        assert len(result["skipped"]) == 1
        assert "damaged.wav" in result["skipped"][0]


def test_many_broken_pairs_stop_the_evaluation(mimi, tmp_path):
    break_files(tmp_path, 20)
    args = settings(swuggy=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(BrokenData, match=r"paper\.swuggy: 2 of 25 pairs are broken, more than 5%. The last: .*wav"):
        evaluate(model_of(0), mimi, tmp_path / "store", args)


def test_a_set_that_is_missing_stops_before_anything_is_scored(mimi, tmp_path):
    make_list(tmp_path, np.random.default_rng(0), 2, 2)
    args = settings(swuggy=str(tmp_path / "pairs.jsonl"), tstorycloze=str(tmp_path))
    with pytest.raises(ConfigError, match=r"paper\.tstorycloze"):
        evaluate(model_of(0), mimi, tmp_path / "store", args)
    assert not list((tmp_path / "store").iterdir())


def test_weights_that_are_not_finite_are_no_accuracy(mimi, tmp_path):
    make_list(tmp_path, np.random.default_rng(0), 2, 2)
    model = model_of(0)
    model.linears[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        evaluate(model, mimi, tmp_path / "store", settings(swuggy=str(tmp_path / "pairs.jsonl")))


def test_a_model_that_predicts_no_audio_is_refused(mimi):
    with pytest.raises(ConfigError, match="dep_q=0: the model predicts no audio"):
        MonoTokenizer(mimi, n_q=8, dep_q=0, delays=[0] * 9, padding_id=3, zero_id=-1)
    with pytest.raises(ConfigError, match=r"mimi\.num_codebooks=8: at least 12 are needed"):
        MonoTokenizer(mimi, n_q=16, dep_q=12, delays=[0] * 17, padding_id=3, zero_id=-1)
