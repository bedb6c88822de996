"""Encrypts what is stored, in pieces: AES-256-GCM, each piece bound to its place, its person and its generation.

A sealed file: `MAGIC`, a salt of 32 bytes, 32 bytes that tell whether a key is the right one, then pieces of 1 MiB with
16 bytes of authentication each. Every file has a key of its own, from the salt by HKDF, so that a nonce can be the
number of the piece and whether it is the last (the STREAM construction). A piece that was changed, swapped, moved to
another file or is missing at the end is noticed.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .secret_files import read_secret_file

MAGIC = b"moshi_patch sealed memory 1\n"
PIECE = 1 << 20
"""Bytes of a piece before it is encrypted; AES-GCM of the library refuses 2 GiB and more in one call."""

TAG, SALT, CHECK = 16, 32, 32
HEAD = len(MAGIC) + SALT + CHECK


class Sealer:
    """Seals and opens with one key.

    Args:
        key_file: 32 bytes, or their 64 hex digits (`openssl rand -hex 32`), for its owner alone.

    Raises:
        ValueError, OSError: in one line that names the file.
    """

    def __init__(self, key_file: str | Path):
        self.key_file = key_file
        content = read_secret_file(key_file)
        if len(content) != 32:
            try:
                content = bytes.fromhex(content.decode("ascii").strip())
            except ValueError:
                content = b""
        if len(content) != 32:
            raise ValueError(f"{key_file}: must hold a key of 32 bytes or 64 hex digits (openssl rand -hex 32).")
        if len(set(content)) < 8:
            raise ValueError(f"{key_file}: no random key, only {len(set(content))} different bytes.")
        if content.isascii() and content.decode().isprintable():  # a password, or half of the digits
            raise ValueError(f"{key_file}: no random key, but 32 letters (openssl rand -hex 32).")
        self._key = content

    def seal(self, pieces: Iterable[bytes], owner: bytes) -> Iterator[bytes]:
        """`pieces`, of any sizes, encrypted.

        Args:
            owner: whose they are; to be given again when they are opened.
        """
        salt = os.urandom(SALT)
        cipher, check = self._derive(salt)
        yield MAGIC + salt + check
        waiting = bytearray()
        number = 0
        for piece in pieces:
            waiting += piece
            while len(waiting) > PIECE:  # not the last one, as something is left
                yield cipher.encrypt(_nonce(number, False), bytes(waiting[:PIECE]), owner)
                del waiting[:PIECE]
                number += 1
        yield cipher.encrypt(_nonce(number, True), bytes(waiting), owner)

    @staticmethod
    def sealed_size(size: int) -> int:
        """Bytes that `size` bytes have when they are sealed."""
        return HEAD + size + TAG * max(1, -(-size // PIECE))

    def open(self, size: int, read: Callable[[int, int], bytes], owner: bytes) -> tuple[int, Iterator[bytes]]:
        """What was sealed: its size in bytes and, as they are asked for, its pieces.

        Args:
            size: of the sealed file in bytes.
            read: `read(start, length)` gives its bytes.

        Raises:
            ValueError: in one line: it is not sealed, another key is needed, or (from the iterator) it is damaged.
        """
        head = read(0, min(size, HEAD))
        if not head.startswith(MAGIC):
            raise ValueError(f"it is not encrypted, but the key in {self.key_file} says that it should be.")
        salt, check = head[len(MAGIC) : -CHECK], head[-CHECK:]
        last, rest = divmod(size - HEAD - 1, PIECE + TAG)
        if len(head) < HEAD or last < 0 or rest + 1 < TAG:
            raise ValueError("the file is damaged or cut off.")
        cipher, expected = self._derive(salt)
        if check != expected:
            raise ValueError(f"the key in {self.key_file} is not the one that it was encrypted with.")

        def pieces() -> Iterator[bytes]:
            for number in range(last + 1):
                begin = HEAD + number * (PIECE + TAG)
                sealed = read(begin, min(size - begin, PIECE + TAG))
                try:
                    yield cipher.decrypt(_nonce(number, number == last), sealed, owner)
                except InvalidTag:
                    raise ValueError("the file is damaged, cut off, or was another person's or generation's.") from None

        return size - HEAD - (last + 1) * TAG, pieces()

    def _derive(self, salt: bytes) -> tuple[AESGCM, bytes]:
        made = HKDF(SHA256(), 32 + CHECK, salt, MAGIC).derive(self._key)
        return AESGCM(made[:32]), made[32:]


def is_sealed(head: bytes) -> bool:
    """Whether a file that begins so, with at least as many bytes as `MAGIC`, is a sealed one."""
    return head.startswith(MAGIC)


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
