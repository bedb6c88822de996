"""How the words of a library get into a message of one line."""


def in_one_line(error: object, limit: int = 200) -> str:
    """The text of `error`, without its last stop, cut after `limit` characters: libraries write whole pages."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= limit else f"{text[:limit]}..."
