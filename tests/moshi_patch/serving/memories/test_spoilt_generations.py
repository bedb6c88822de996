"""A generation that was spoilt, moved, cut off, or made by somebody with an ill will is refused in one line."""

import json
import re
import shutil

import pytest

from moshi_patch.serving.memories.sealing import HEAD, PIECE, TAG, Sealer
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.store_types import StoreError
from tests.support.memories import assert_same
from tests.support.memory_stores import file_of, key_file, model_and_memory, other_memory

pytestmark = pytest.mark.usefixtures("patched")


def refused(store: MemoryStore, person: str = "anna") -> str:
    with pytest.raises(StoreError) as error:
        store.read(person)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500
    return str(error.value)


def change_header(change):
    """The same file, after `change(header)`."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return damage


def first_tensor(header: dict) -> dict:
    return next(entry for key, entry in header.items() if key != "__metadata__")


def flip(at: int):
    def damage(content: bytes) -> bytes:
        content = bytearray(content)
        content[at] ^= 1
        return bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "ends too early"),
        (lambda content: content[:7], "ends too early"),
        (lambda content: content[:200], "its header has"),
        (lambda content: content[:-1], "it has .* bytes and says"),
        (lambda content: content[:-5000], "it has .* bytes and says"),
        (lambda content: content + b"x", "it has .* bytes and says"),
        (lambda content: bytes(len(content)), "its header has 0 bytes"),
        (lambda content: b"\xff" * len(content), "its header has 18446744073709551615 bytes"),
        (flip(-1), "its tensors are not those that were saved"),
        (flip(9), "its header: not valid JSON|format|no tensors"),
        (
            change_header(lambda h: h["__metadata__"].update(format="moshi_patch memory 2")),
            "that this version can read",
        ),
        (change_header(lambda h: {**h, "__metadata__": {"format": ["x"]}}), "that this version can read"),
        (change_header(lambda h: [h]), "its header: must hold an object"),
        (change_header(lambda h: h["__metadata__"].update(person="otto")), "the person in its header is another one"),
        (change_header(lambda h: h["__metadata__"].update(generation="7")), "the generation in its header is '7'"),
        (change_header(lambda h: h["__metadata__"].pop("person") and None), "the person in its header is another one"),
        (
            change_header(lambda h: h["__metadata__"].update(fingerprint="{}")),
            "the settings in its fingerprint are None",
        ),
        (change_header(lambda h: h["__metadata__"].update(state="{}")), "not those that were saved"),
        (change_header(lambda h: h["__metadata__"].pop("narrowed") and None), "its 'narrowed': not valid JSON"),
        (change_header(lambda h: h["__metadata__"].update(narrowed='{"x": "float32"}')), "its 'narrowed': 'float32'"),
        (change_header(lambda h: h["__metadata__"].update(narrowed='{"x": []}')), r"its 'narrowed': \[\]"),
        (change_header(lambda h: first_tensor(h).update(dtype="F8")), "no tensors that lie side by side"),
        (change_header(lambda h: first_tensor(h).update(shape=[1 << 47, 1 << 47])), "no tensors that lie side by side"),
        (change_header(lambda h: first_tensor(h).update(shape=[-1])), "no tensors that lie side by side"),
        (change_header(lambda h: first_tensor(h).update(shape="11")), "no tensors that lie side by side"),
        (change_header(lambda h: first_tensor(h).update(data_offsets=[0, 1e999])), "no tensors that lie side by side"),
        (
            change_header(lambda h: {**h, "more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            "of other layers",
        ),
        (
            change_header(lambda h: {**h, "huge": {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]}}),
            "no tensors that lie side by side",
        ),
    ],
)
def test_a_spoilt_file_is_refused_with_its_reason(tmp_path, damage, reason):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path, model)
    store.write("anna", memory, 0)
    path = file_of(store, "anna", 1)
    path.write_bytes(damage(path.read_bytes()))
    assert re.search(rf"{tmp_path}: cannot be read: generation 1: .*({reason})", refused(store))


def test_a_tensor_of_another_size_is_refused_before_anything_of_its_size_is_allocated(tmp_path):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path, model)
    large = {key: t.repeat(1, 3, 1) if key.endswith(".delta") else t for key, t in memory.items()}
    store.write("anna", large, 0)
    assert "delta is float32[1, 48, 44] in it and float32[2, 16, 44] in the model" in refused(store)
    three = {key: t.repeat(3, *[1] * (t.dim() - 1)) for key, t in memory.items()}
    store.write("otto", three, 0)
    assert "in it and" in refused(store, "otto")


def test_every_byte_of_a_sealed_file_counts(tmp_path):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path / "store", model, key_file(tmp_path))
    store.write("anna", memory, 0)
    path = file_of(store, "anna", 1)
    content = path.read_bytes()
    assert b"anna" not in content
    assert b"fingerprint" not in content
    for at in (0, 28, 59, 60, 91, 92, 5000, len(content) - 1):
        path.write_bytes(flip(at)(content))
        assert "generation 1: " in refused(store)
    for size in (0, 10, HEAD - 1, HEAD, HEAD + 15, HEAD + 16, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "generation 1: " in refused(store)
    path.write_bytes(content + b"x")
    assert "damaged, cut off" in refused(store)


def test_a_sealed_file_is_one_persons_and_one_generations(tmp_path):
    model, memory = model_and_memory()
    key = key_file(tmp_path)
    store = MemoryStore(tmp_path / "store", model, key)
    store.write("anna", memory, 0)
    store.write("anna", other_memory(memory, 1), 1)
    store.write("otto", other_memory(memory, 2), 0)
    anna = file_of(store, "anna", 2)
    content = anna.read_bytes()
    for stolen in (file_of(store, "anna", 1), file_of(store, "otto", 1)):
        shutil.copy(stolen, anna)
        assert "damaged, cut off, or was another person's or generation's" in refused(store)
    anna.write_bytes(content)
    assert_same(store.read("anna").memory, other_memory(memory, 1))
    other = key_file(tmp_path, "other")
    assert f"the key in {other} is not the one that it was encrypted with" in refused(
        MemoryStore(tmp_path / "store", model, other)
    )
    assert "it is encrypted, and can be read with the key" in refused(MemoryStore(tmp_path / "store", model))
    MemoryStore(tmp_path / "store", model).write("emma", memory, 0)
    assert f"it is not encrypted, but the key in {key} says that it should be" in refused(store, "emma")


def pieces_of(sealer: Sealer, content: bytes, owner: bytes) -> bytes:
    size, pieces = sealer.open(len(content), lambda start, length: content[start : start + length], owner)
    opened = b"".join(pieces)
    assert len(opened) == size
    return opened


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 7])
def test_what_is_sealed_opens_again_at_every_size(tmp_path, size):
    sealer = Sealer(key_file(tmp_path))
    plain = bytes(range(256)) * (size // 256 + 1)
    given = [plain[:size][at : at + 300_001] for at in range(0, size, 300_001)]
    sealed = b"".join(sealer.seal(given, b"anna/1"))
    assert len(sealed) == sealer.sealed_size(size)
    assert pieces_of(sealer, sealed, b"anna/1") == plain[:size]


def test_pieces_cannot_be_swapped_dropped_repeated_or_taken_from_another_file(tmp_path):
    sealer = Sealer(key_file(tmp_path))
    one, two = (b"".join(sealer.seal([bytes([n]) * 3 * PIECE], b"anna/1")) for n in (1, 2))
    step = PIECE + TAG
    head, *parts = one[:HEAD], *(one[at : at + step] for at in range(HEAD, len(one), step))
    assert len(parts) == 3
    theirs = two[HEAD : HEAD + step]
    for wrong in (
        [parts[1], parts[0], parts[2]],
        parts[:2],
        parts[:1],
        [parts[0], parts[2]],
        [*parts, parts[2]],
        [parts[0], parts[0], parts[2]],
        [theirs, parts[1], parts[2]],
    ):
        with pytest.raises(ValueError, match="damaged, cut off"):
            pieces_of(sealer, head + b"".join(wrong), b"anna/1")
    for owner in (b"anna/2", b"otto/1", b""):
        with pytest.raises(ValueError, match="another person's or generation's"):
            pieces_of(sealer, one, owner)
    assert pieces_of(sealer, one, b"anna/1") == bytes([1]) * 3 * PIECE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must hold a key of 32 bytes or 64 hex digits"),
        (b"x" * 31, "must hold a key"),
        (b"g" * 64, "must hold a key"),
        ("ä".encode() * 32, "must hold a key"),
        (bytes(32), "no random key, only 1 different bytes"),
        (b"password" * 4, "no random key, only 7 different bytes"),
        (b"correct horse battery staple 123", "no random key, but 32 letters"),
        (b"0123456789abcdef" * 2, "no random key, but 32 letters"),
    ],
)
def test_a_file_that_holds_no_key_is_refused(tmp_path, content, reason):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match=rf"^{path}: {reason}"):
        MemoryStore(tmp_path, None, path)


def test_a_key_may_be_bytes_or_digits_and_is_for_its_owner_alone(tmp_path):
    key = key_file(tmp_path)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes.fromhex(key.read_text()))
    raw.chmod(0o600)
    key.write_text(f"{key.read_text().upper()}\n")
    sealed = b"".join(Sealer(key).seal([b"x"], b""))
    assert pieces_of(Sealer(raw), sealed, b"") == b"x"
    key.chmod(0o644)
    with pytest.raises(StoreError, match=r"others may read or change it \(mode 644\): chmod 600"):
        MemoryStore(tmp_path, None, key)
