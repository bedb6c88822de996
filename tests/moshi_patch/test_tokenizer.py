"""A text tokenizer is loaded when it has the model's pieces, and no word where the model reads padding."""

import json
import string
import sys

import pytest
import sentencepiece
from moshi.models.loaders import CheckpointInfo

import moshi_patch
from moshi_patch.__main__ import main
from tests.support.text_tokenizers import write_tokenizer
from tests.support.tiny_repository import DATA

MODEL = {"text_card": 40}
LETTERS = " ".join(string.ascii_lowercase + string.digits)


def test_the_tokenizer_of_the_model_is_loaded(tmp_path):
    path = write_tokenizer(tmp_path / "own.model", 40)
    assert moshi_patch.load_text_tokenizer(path, MODEL).get_piece_size() == 40


@pytest.mark.parametrize("pieces", [39, 41, 300])
def test_another_number_of_pieces_is_refused(tmp_path, pieces):
    path = write_tokenizer(tmp_path / "other.model", pieces)
    with pytest.raises(ValueError, match=rf"has {pieces} pieces, and the model text_card=40"):
        moshi_patch.load_text_tokenizer(path, MODEL)
    with pytest.raises(ValueError, match=rf"has {pieces} pieces, and the model text_card=32000"):
        moshi_patch.load_text_tokenizer(path, None)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ({"pad_id": -1}, "at id 3, which the model reads as padding"),
        ({"pad_id": 5}, "at id 3, which the model reads as padding"),
        ({"unk_id": 5, "pad_id": 3}, "at id 0, which the model reads as the end of padding"),
    ],
)
def test_a_word_where_the_model_reads_padding_is_refused(tmp_path, ids, named):
    pieces = 40 if ids["pad_id"] < 0 else 41
    path = write_tokenizer(tmp_path / "other.model", pieces, LETTERS, fill=False, **ids)
    with pytest.raises(ValueError, match=named):
        moshi_patch.load_text_tokenizer(path, {"text_card": pieces})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"existing_text_padding_id": 39}, "at id 39, which the model reads as padding"),
        ({"existing_text_end_padding_id": 38}, "at id 38, which the model reads as the end of padding"),
        ({"existing_text_padding_id": 40}, "no piece for padding, which is existing_text_padding_id=40"),
        ({"existing_text_padding_id": "3"}, "no piece for padding, which is existing_text_padding_id='3'"),
        ({"existing_text_end_padding_id": -1}, "no piece for the end of padding"),
    ],
)
def test_a_model_with_other_ids_of_padding_needs_them_in_its_tokenizer(tmp_path, settings, named):
    path = write_tokenizer(tmp_path / "other.model", 40)
    with pytest.raises(ValueError, match=named):
        moshi_patch.load_text_tokenizer(path, MODEL | settings)


def test_a_padding_that_is_written_like_a_symbol_is_no_word(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LETTERS]),
        model_prefix=str(tmp_path / "symbol"),
        vocab_size=41,
        model_type="char",
        user_defined_symbols=["<pad>"],
        minloglevel=2,
    )
    assert moshi_patch.load_text_tokenizer(tmp_path / "symbol.model", {"text_card": 41}).id_to_piece(3) == "<pad>"


@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256)) * 40])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "damaged.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a sentencepiece model .*; copy it anew"):
        moshi_patch.load_text_tokenizer(tmp_path / "damaged.model", MODEL)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        moshi_patch.load_text_tokenizer(tmp_path, MODEL)


@pytest.mark.parametrize("program", ["moshi.run_inference", "moshi.server"])
def test_moshis_programs_end_in_one_line_before_any_weights_are_read(patched, tmp_path, monkeypatch, program):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    repo = {"text_card": 40, "n_q": 8, "dep_q": 4}
    files = {"moshi_name": "model", "mimi_name": "mimi", "tokenizer_name": "own.model"}
    (tmp_path / "config.json").write_text(json.dumps(repo | files))
    for name in ("model", "mimi"):
        (tmp_path / name).write_bytes(b"not read")
    write_tokenizer(tmp_path / "own.model", 40)
    other = write_tokenizer(tmp_path / "other.model", 39)
    stock = CheckpointInfo.from_hf_repo
    words = ["--device", "cpu", "--hf-repo", str(tmp_path), "--tokenizer", str(other)]
    files = [str(DATA / "boat.wav"), str(tmp_path / "out.wav")] * (program == "moshi.run_inference")
    with pytest.raises(SystemExit) as exit_:
        main([program, *words, *files])
    message = f"python -m moshi_patch: the text tokenizer {str(other)!r}: has 39 pieces, and the model text_card=40"
    assert str(exit_.value.code).startswith(message)
    assert CheckpointInfo.from_hf_repo is stock
