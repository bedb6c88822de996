"""Sentencepiece models made for a test: of a size, and with the special ids asked for."""

import io
from pathlib import Path

import sentencepiece

TEXT = "my sister has a boat and it is called nim what is the name of the boat in the harbour of the old town"


def write_tokenizer(path: Path, pieces: int, text: str = TEXT, *, fill: bool = True, **ids: int) -> Path:
    """A model of `pieces` pieces: the letters of `text`, and control symbols, with Moshi's ids if `ids` say no other.

    Args:
        fill: put control symbols at the ids before the letters; False: the letters alone are as many as it takes.
    """
    special = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3} | ids
    letters = len({*text, "▁"} - {" "})
    missing = pieces - letters - sum(value >= 0 for value in special.values())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 3),
        model_writer=model,
        vocab_size=pieces,
        model_type="char",
        character_coverage=1.0,
        control_symbols=[f"<{index}>" for index in range(missing)] if fill else [],
        num_threads=1,
        minloglevel=2,
        **special,
    )
    path.write_bytes(model.getvalue())
    assert sentencepiece.SentencePieceProcessor(str(path)).get_piece_size() == pieces
    return path
