"""The text tokenizer that a setting names, refused when it does not fit the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moshi_patch

from ..common.errors import ConfigError


class UnfitTokenizer(ConfigError):
    """A text tokenizer that is damaged, or is that of another model."""


def padding_ids(lm_kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """The ids of padding and of its end in a model with these arguments."""
    return lm_kwargs.get("existing_text_padding_id", 3), lm_kwargs.get("existing_text_end_padding_id", 0)


def load_text_tokenizer(
    path: str | Path, lm_kwargs: Mapping[str, Any] | None, key: str = "moshi_paths.tokenizer_path"
) -> Any:
    """`moshi_patch.load_text_tokenizer`, for a setting.

    Args:
        key: of the setting that named the file.

    Raises:
        UnfitTokenizer: naming key and file.
    """
    try:
        return moshi_patch.load_text_tokenizer(path, lm_kwargs)
    except ValueError as error:
        raise UnfitTokenizer(f"{key}={str(path)!r}: {error}.") from error
