"""How the words of a library get into a message of one line."""


def in_one_line(error: object, limit: int = 200) -> str:
    """The text of `error`, without its last stop, cut after `limit` characters: libraries write whole pages.

    What cannot be seen is written as Python does (`\\x1b`): in a name from a file it could steer a terminal.
    """
    text = " ".join(str(error).split()).rstrip(".")
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= limit else f"{text[:limit]}..."
