"""Real speech: what `example/data` holds, and moshi's own inference on it with TTT from a local repository."""

import json
import shutil
import subprocess
import sys
from itertools import takewhile

import numpy as np
import pytest
import sphn
import torch
from moshi.models import LMGen, loaders
from safetensors.torch import load_file

import moshi_patch
from example.tiny_repo import main
from moshi_patch.repository import local_repositories
from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT, build_repo

pytestmark = pytest.mark.slow

DIALOGUES = ["boat", "sister", "train"]
CHANNELS = {"SPEAKER_MAIN": 0, "SPEAKER_USER": 1}
STEPS = 40  # two chunks of 16 and a half one


@pytest.fixture(scope="module")
def tiny_repo(tmp_path_factory):
    return build_repo(tmp_path_factory.mktemp("tiny") / "repo")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny_repo, patched, one_thread):
    """The language model of the tiny repository, through the stock loader, and codes of real speech for it."""
    with local_repositories():
        info = loaders.CheckpointInfo.from_hf_repo(str(tiny_repo))
    mimi = info.get_mimi()
    pcm = torch.from_numpy(sphn.read(str(DATA / "boat.wav"))[0])[None, 1:, : STEPS * mimi.frame_size]
    with torch.no_grad():
        return info.get_moshi(dtype=torch.float32), mimi.encode(pcm)


def alignments(name: str) -> list:
    return json.loads((DATA / f"{name}.json").read_text())["alignments"]


def test_every_dialogue_is_listed_once_with_its_duration():
    entries = [json.loads(line) for name in ("train", "eval") for line in (DATA / f"{name}.jsonl").open()]
    assert sorted(entry["path"] for entry in entries) == [f"{name}.wav" for name in DIALOGUES]
    for entry in entries:
        assert sphn.durations([str(DATA / entry["path"])]) == [pytest.approx(entry["duration"])]


@pytest.mark.parametrize("name", DIALOGUES)
def test_each_word_is_heard_where_its_alignment_says_and_on_its_speakers_channel(name):
    audio, rate = sphn.read(str(DATA / f"{name}.wav"))
    assert rate == 24_000
    assert audio.shape[0] == 2
    rest = audio.copy()
    for _, (start, end), speaker in alignments(name):
        first, last = round(start * rate), round(end * rate)
        peak = np.abs(audio[:, first:last]).max(axis=1)
        assert 0.5 < peak[CHANNELS[speaker]] < 0.7
        assert peak[1 - CHANNELS[speaker]] == 0
        rest[:, first - 2 : last + 2] = 0  # times are rounded to a tenth of a millisecond
    assert np.abs(rest).max() == 0


@pytest.mark.parametrize("name", DIALOGUES)
def test_what_the_user_says_first_moshi_says_last(name):
    words = alignments(name)
    *_, fact = takewhile(lambda word: word[2] == "SPEAKER_USER", words)
    assert (words[-1][0], words[-1][2]) == (fact[0], "SPEAKER_MAIN")


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_fact_returns_after_what_all_attention_layers_together_reach(name):
    from example.tiny_repo import LM

    words = alignments(name)
    *_, (fact, (_, said), _) = takewhile(lambda word: word[2] == "SPEAKER_USER", words)
    returns = [start for word, (start, _), speaker in words if word == fact and speaker == "SPEAKER_MAIN"]
    reach = LM["num_layers"] * (LM["context"] - 1)
    longest_delay = max(LM["delays"])
    assert len(returns) == 1
    assert (returns[0] - said) * 12.5 > reach + longest_delay + 2  # a step may hold the end of one and begin of another


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_the_speech_can_be_made_again(tmp_path):
    from example.make_speech import make_speech

    for folder in ("a", "b"):
        make_speech(tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in DATA.iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    for name in DIALOGUES:
        again = json.loads((tmp_path / "a" / f"{name}.json").read_text())["alignments"]
        assert [(word, speaker) for word, _, speaker in again] == [(word, who) for word, _, who in alignments(name)]


def test_run_inference_answers_a_speech_file_on_the_cpu(tiny_repo, tmp_path):
    speech, answer = DATA / "sister.wav", tmp_path / "out.wav"
    command = [sys.executable, "-m", "moshi_patch", "moshi.run_inference", "--device", "cpu"]
    command += ["--hf-repo", str(tiny_repo), "--batch-size", "1", str(speech), str(answer)]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    heard, said = sphn.read(str(speech))[0], sphn.read(str(answer))[0]
    assert said.shape == (1, heard.shape[1])
    assert np.abs(said).max() > 0.01


def test_the_same_seed_makes_the_same_repository(tiny_repo, tmp_path):
    installed = moshi_patch.is_installed()
    again = build_repo(tmp_path / "again")
    assert moshi_patch.is_installed() == installed
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in tiny_repo.iterdir())
    for path in again.iterdir():
        assert path.read_bytes() == (tiny_repo / path.name).read_bytes(), path.name


def test_a_stock_repository_has_the_same_weights_and_knows_nothing_of_ttt(tiny_repo, tmp_path):
    main([str(tmp_path / "stock")])
    stock, with_ttt = load_file(tmp_path / "stock" / "model.safetensors"), load_file(tiny_repo / "model.safetensors")
    assert stock.keys() == {name for name in with_ttt if "target_generator" not in name}
    assert all(torch.equal(tensor, with_ttt[name]) for name, tensor in stock.items())
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not [key for key in config if key.startswith("ttt")]
    assert (tmp_path / "stock" / "mimi.safetensors").read_bytes() == (tiny_repo / "mimi.safetensors").read_bytes()
    main([str(tmp_path / "ttt"), "--ttt"])
    assert (tmp_path / "ttt" / "model.safetensors").read_bytes() == (tiny_repo / "model.safetensors").read_bytes()


def test_overrides_reach_the_model(tmp_path, patched, one_thread):
    repo = build_repo(tmp_path / "repo", num_layers=2, ttt_layers="all", ttt_chunk_size=4)
    with local_repositories():
        lm = loaders.CheckpointInfo.from_hf_repo(str(repo)).get_moshi()
    assert list(moshi_patch.ttt_gatings(lm)) == ["transformer.layers.0.gating", "transformer.layers.1.gating"]
    assert lm.ttt_config.chunk_size == 4


def test_a_local_repository_carries_ttt_through_the_stock_loader(tiny_repo, model):
    lm, _ = model
    saved = load_file(tiny_repo / "model.safetensors")
    assert list(moshi_patch.ttt_gatings(lm)) == ["transformer.layers.1.gating", "transformer.layers.3.gating"]
    assert lm.ttt_config.chunk_size == 16
    for name, parameter in moshi_patch.ttt_parameters(lm).items():
        assert torch.equal(parameter, saved[name])


def test_real_speech_makes_one_update_per_chunk_in_every_layer(model):
    lm, codes = model
    assert len(codes[0, 0].unique()) > 10  # different sounds have different codes
    lm_gen = LMGen(lm, use_sampling=False)
    with lm_gen.streaming(1):
        for step in codes.split(1, dim=2):
            lm_gen.step(step)
        stats = moshi_patch.ttt_stats(lm)
    assert len(stats) == 2
    for layer in stats.values():
        assert layer["updates"] == [STEPS // 16]
        assert 1e-3 < layer["relative_delta"][0] < 1
