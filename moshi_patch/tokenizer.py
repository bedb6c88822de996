"""The text tokenizer of a model: loaded only when its pieces are those that the model was made for."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from moshi.models import loaders

from .errors import in_one_line

DEFAULTS = {"text_card": 32000, "existing_text_padding_id": 3, "existing_text_end_padding_id": 0}
"""What `LMModel` assumes where its arguments do not say it."""

NOT_TEXT = {"existing_text_padding_id": "padding", "existing_text_end_padding_id": "the end of padding"}
"""Ids that the model reads as something else than text."""


def load_text_tokenizer(path: str | Path, lm_kwargs: Mapping[str, Any] | None) -> Any:
    """The `sentencepiece.SentencePieceProcessor` in `path`, which fits a model with these arguments. Reads no weights.

    A tokenizer with more pieces gives ids that the model has no embedding for; with fewer, the model says ids that are
    no text. An id that the model reads as padding must not be a piece of words.

    Args:
        lm_kwargs: arguments of `LMModel`, as in a `config.json`; None for those of the first Moshi 7B.

    Raises:
        ValueError: when it is no such file, or does not fit; names the number or the id, and what the model has.
    """
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"not a sentencepiece model ({in_one_line(error)}); copy it anew") from error
    config = DEFAULTS | {key: value for key, value in (lm_kwargs or {}).items() if key in DEFAULTS}
    pieces, text_card = tokenizer.get_piece_size(), config["text_card"]
    if pieces != text_card and (lm_kwargs is None or "text_card" in lm_kwargs):  # else it is no model's config
        raise ValueError(f"has {pieces} pieces, and the model text_card={text_card}; use the model's own tokenizer")
    for key, meaning in NOT_TEXT.items():
        token = config[key]
        if not isinstance(token, int) or not 0 <= token < pieces:
            raise ValueError(f"has no piece for {meaning}, which is {key}={token!r} in the model")
        if _is_text(tokenizer, token):
            raise ValueError(
                f"has the piece {tokenizer.id_to_piece(token)!r} of words at id {token}, which the model reads as "
                f"{meaning} ({key}); use the model's own tokenizer"
            )
    return tokenizer


def _is_text(tokenizer: Any, token: int) -> bool:
    """Whether words are encoded with this id. Not with a control symbol, nor one that is written like `<pad>`."""
    if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
        return False
    piece = tokenizer.id_to_piece(token)
    return tokenizer.is_byte(token) or (piece[:1] + piece[-1:]) not in ("<>", "[]")


@contextlib.contextmanager
def fitting_tokenizers(prog: str) -> Iterator[None]:
    """Inside, `CheckpointInfo.from_hf_repo` ends the program `prog` in one line when the tokenizer does not fit."""
    stock = loaders.CheckpointInfo.from_hf_repo

    def from_hf_repo(*args: Any, **kwargs: Any) -> loaders.CheckpointInfo:
        info = stock(*args, **kwargs)
        try:
            load_text_tokenizer(info.tokenizer, info.lm_config)
        except ValueError as error:
            raise SystemExit(f"{prog}: the text tokenizer {str(info.tokenizer)!r}: {error}.") from error
        return info

    loaders.CheckpointInfo.from_hf_repo = staticmethod(from_hf_repo)
    try:
        yield
    finally:
        loaders.CheckpointInfo.from_hf_repo = staticmethod(stock)
