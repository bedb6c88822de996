"""Data: the text row by hand, and the codes of real audio."""

import copy
import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch
from moshi.conditioners import ConditionProvider
from moshi.conditioners.text import LUTConditioner

from finetune.data.broken import BrokenItem
from finetune.data.encode import encode
from finetune.data.loader import TrainLoader
from finetune.data.manifest import read_entries, read_transcript
from finetune.data.resample import resample
from finetune.data.segments import Segment
from finetune.data.text_row import place_words, text_row
from finetune.data.tokenize import SpeechTokenizer
from finetune.model.loss import compute_loss
from tests.support.datasets import DEP_Q, FRAME, MAIN, N_Q, RATE, USER, make_tokenizer, run_args, write_dataset
from tests.support.models import tiny_model
from tests.support.tiny_repository import DATA


class Words:
    """A text tokenizer whose tokens can be read: `{"word": [ids]}`."""

    def __init__(self, tokens):
        self.tokens = tokens

    def encode(self, text):
        return self.tokens[text]


DOZEN = [
    ("so", (1.20, 1.40), MAIN),  # not sorted; step 15
    ("hello", (0.00, 0.28), MAIN),  # step 0: no step before it
    (" my ", (0.30, 0.32), MAIN),  # step 3, after padding
    ("boat", (0.33, 0.49), MAIN),  # step 4, right after; its third token and all after it are dropped
    ("is", (0.40, 0.60), USER),  # not Moshi
    ("called", (0.50, 0.55), MAIN),  # step 6; its second token falls to the next word
    ("Nim", (0.57, 0.59), MAIN),  # step 7, all of it falls to the next word, of the same step
    ("bus", (0.60, 0.70), MAIN),  # step 7
    ("uh", (0.75, 0.75), MAIN),  # no duration
    ("yes", (0.96, 1.00), MAIN),  # step 12, exactly at its start
    ("back", (1.10, 1.00), MAIN),  # negative duration
    ("long", (1.52, 1.60), MAIN),  # step 19, the last; its second token is cut off
    ("late", (1.60, 1.70), MAIN),  # step 20, outside
]
TOKENS = {
    "hello": [10, 11],
    "my": [12],
    "boat": [13, 14, 15, 27, 28, 29],
    "called": [16, 17],
    "Nim": [18],
    "bus": [19, 20],
    "yes": [21],
    "so": [22, 23],
    "long": [24, 25],
    "late": [26],
}
ROW = [10, 11, 0, 12, 13, 14, 16, 19, 20, 3, 3, 0, 21, 3, 0, 22, 23, 3, 0, 24]


def test_text_row_of_a_dozen_words():
    row = text_row(DOZEN, Words(TOKENS), 20)
    assert row.dtype == torch.int64
    assert row.tolist() == [ROW]


@pytest.mark.parametrize("first", [1, 7, 12, 15])
def test_a_word_falls_in_the_same_step_wherever_the_file_is_cut(first):
    row = text_row(DOZEN, Words(TOKENS), 20 - first, first_step=first)[0].tolist()
    begins = [10, 12, 13, 16, 19, 21, 22, 24]  # first tokens that are placed
    started = next(i for i in range(first, 20) if ROW[i] in begins)
    assert row[started - first :] == ROW[started:]
    assert set(row[: started - first]) <= {0, 3}  # words that started before the cut are left out


def test_a_word_that_starts_with_a_step_stands_in_that_step():
    for step in range(400):
        start = round(step * 0.08, 2)
        (placed,) = place_words([("yes", (start, start + 0.3), "SPEAKER_MAIN")], Words({"yes": [7]}), 500)
        assert placed.step == step, start
    (before,) = place_words([("yes", (2.319, 2.5), "SPEAKER_MAIN")], Words({"yes": [7]}), 500)
    assert before.step == 28


def test_without_words_the_row_is_padding():
    assert text_row([], Words({}), 3).tolist() == [[3, 3, 3]]


@pytest.fixture
def tokenizer(codec):
    return make_tokenizer(codec)


@torch.no_grad()
def test_codes_are_text_then_moshi_then_user_and_the_rest_is_zero_tokens(codec, tokenizer):
    mimi, _ = codec
    (entry,) = read_entries(DATA / "eval.jsonl")[0]
    segments = tokenizer.segments(entry)
    assert [segment.first_step for segment in segments] == [0, 50, 100]  # 11.6 s are 145 steps
    codes = tokenizer(segments[2]).codes
    assert (codes.shape, codes.dtype) == ((1, 1 + N_Q, 50), torch.int64)
    pcm = torch.from_numpy(loaders_read(entry.path))[:, 100 * FRAME :]
    moshi, user = mimi.encode(pcm[:, None])
    assert torch.equal(codes[0, 1 : 1 + DEP_Q, :45], moshi)
    assert torch.equal(codes[0, 1 + DEP_Q :, :45], user)
    assert not torch.equal(moshi, user)
    words = read_transcript(entry.path.with_suffix(".json")).alignments
    assert torch.equal(codes[0, :1, :45], text_row(words, tokenizer.text_tokenizer, 45, first_step=100))
    assert (codes[0, :, 45:] == -1).all()
    assert (codes[0, :, :45] >= 0).all()


@pytest.mark.parametrize("block_steps", [1, 7, 40, 144])
@torch.no_grad()
def test_a_recording_encoded_in_blocks_has_the_codes_of_one_pass(codec, block_steps):
    mimi = copy.deepcopy(codec[0]).double()  # this random one's codewords lie so close that float32 would decide
    pcm = torch.from_numpy(loaders_read(DATA / "sister.wav")).double()[:, None, :-100]  # the last frame is not whole
    codes = mimi.encode(pcm)
    assert codes.shape[2] == 145
    assert mimi.encoder_transformer.transformer.layers[0].self_attn.context < 2 * 145, "the window is never full"
    assert torch.equal(encode(mimi, pcm, block_steps), codes)
    assert torch.equal(mimi.encode(pcm), codes), "something was left behind"


def loaders_read(path: Path) -> np.ndarray:
    """`[2, samples]` by the standard library."""
    with wave.open(str(path)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
        return np.ascontiguousarray(pcm.reshape(-1, file.getnchannels()).T) / 32768


@torch.no_grad()
def test_padding_carries_no_loss(tokenizer):
    (entry,) = read_entries(DATA / "eval.jsonl")[0]
    model = tiny_model(torch.float32, n_q=N_Q, dep_q=DEP_Q, card=64, text_card=96, delays=[0] * (1 + N_Q))
    codes = tokenizer(tokenizer.segments(entry)[2]).codes
    padded = compute_loss(model(codes), codes, dep_q=DEP_Q)
    cut = compute_loss(model(codes[..., :45]), codes[..., :45], dep_q=DEP_Q)
    torch.testing.assert_close(padded.sums, cut.sums, rtol=1e-5, atol=0)
    assert torch.equal(padded.counts, cut.counts)


def test_an_item_is_the_same_from_the_cache(codec):
    tokenizer = make_tokenizer(codec, cache_items=1)
    first, second = tokenizer.segments(read_entries(DATA / "eval.jsonl")[0][0])[:2]
    one = tokenizer(first).codes
    assert torch.equal(one, tokenizer(first).codes)
    tokenizer(second)
    assert list(tokenizer._cache) == [second]
    assert torch.equal(one, tokenizer(first).codes)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_resampling_is_in_time(rate):
    pcm = np.zeros((2, rate), dtype=np.float32)
    pcm[0, rate // 4] = pcm[1, -rate // 100] = 1
    out = resample(pcm, rate, RATE)
    assert out.shape == (2, RATE)
    assert abs(np.abs(out[0]).argmax() - RATE // 4) <= 1
    assert abs(np.abs(out[1]).argmax() - (RATE - RATE // 100)) <= 1


@pytest.mark.parametrize(
    ("n_q", "dep_q", "named"), [(8, 8, "dep_q=8, n_q=8"), (8, 0, "dep_q=0"), (10, 5, "num_codebooks=4")]
)
def test_models_that_are_no_dialogue_are_refused(codec, n_q, dep_q, named):
    with pytest.raises(ValueError, match=named):
        SpeechTokenizer(*codec, n_q=n_q, dep_q=dep_q, duration_sec=4)


def test_text_conditions_reach_the_batch_if_the_model_takes_them(tmp_path, codec):
    path = write_dataset(tmp_path, 2)
    content = json.loads((tmp_path / "train0.json").read_text())
    conditions = {"description": "very_good", "unknown": "x"}
    (tmp_path / "train0.json").write_text(json.dumps(content | {"text_conditions": conditions}))
    args = run_args(path, 2, shuffle=False)
    assert next(TrainLoader(args, make_tokenizer(codec, 0.32))).condition_attributes is None
    batch = next(TrainLoader(args, make_tokenizer(codec, 0.32, conditions=["description"])))
    assert [row.text for row in batch.condition_attributes] == [{"description": "very_good"}, {"description": None}]


@pytest.mark.parametrize("mood", ["angry", 3, ["good"]])
def test_a_text_condition_that_the_model_does_not_know_is_a_broken_item(tmp_path, codec, mood):
    provider = ConditionProvider(
        {"mood": LUTConditioner(2, "noop", ["good", "bad"], dim=4, output_dim=4, device="cpu")}
    )
    tokenizer = make_tokenizer(codec, 0.32, conditions=["mood"], prepare=provider.prepare)
    write_dataset(tmp_path, 2)
    for index, value in enumerate(["good", mood]):
        content = json.loads((tmp_path / f"train{index}.json").read_text())
        (tmp_path / f"train{index}.json").write_text(json.dumps(content | {"text_conditions": {"mood": value}}))
    assert tokenizer(Segment(tmp_path / "train0.wav", 0)).conditions.text == {"mood": "good"}
    with pytest.raises(BrokenItem, match=r"train1\.wav from step 0: text_conditions="):
        tokenizer(Segment(tmp_path / "train1.wav", 0))


@pytest.mark.parametrize("rate", [0, 1, 4_000_000_000])
def test_a_header_with_an_impossible_rate_is_a_broken_item(tmp_path, tokenizer, rate):
    write_dataset(tmp_path, 1)
    path = tmp_path / "train0.wav"
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(BrokenItem, match=r"train0\.wav from step 0"):
        tokenizer(Segment(path, 0))


def test_a_rest_too_short_for_one_sample_of_mimis_is_a_broken_item(tmp_path, tokenizer):
    write_dataset(tmp_path, 1)
    samples = np.zeros((2, 4 * 2 * RATE + 1), dtype=np.float32)  # a segment of 4 seconds at 48 kHz, and one more
    sphn.write_wav(str(tmp_path / "train0.wav"), samples, 2 * RATE)
    tokenizer(Segment(tmp_path / "train0.wav", 0))
    with pytest.raises(BrokenItem, match="no audio"):
        tokenizer(Segment(tmp_path / "train0.wav", 50))


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_a_segment_that_starts_at_the_end_is_a_broken_item(tmp_path, codec, rate):
    write_dataset(tmp_path, 1)
    tokenizer = make_tokenizer(codec, duration_sec=0.08)
    for steps in range(1, 120, 7):  # rounded down, some of these ends are one sample before the last
        sphn.write_wav(str(tmp_path / "train0.wav"), np.zeros((2, round(steps * 0.08 * rate)), "f"), rate)
        with pytest.raises(BrokenItem, match=r"no audio|out-of-range"):
            tokenizer(Segment(tmp_path / "train0.wav", steps))
        assert tokenizer(Segment(tmp_path / "train0.wav", steps - 1))


def test_the_end_of_a_too_long_duration_is_broken(tmp_path, tokenizer):
    shutil.copy(DATA / "boat.wav", tmp_path)
    shutil.copy(DATA / "boat.json", tmp_path)
    with pytest.raises(BrokenItem, match=r"boat\.wav from step 200"):
        tokenizer(Segment(tmp_path / "boat.wav", 200))
