"""Names of people: any that can be read, each with a folder of its own that it cannot leave."""

import pytest

from moshi_patch.serving.memories.persons import check_person, folder_of, look_alike, person_of

NAMES = ["anna", "Anna", "ANNA", "a b", "../anna", "/etc/passwd", "..", ".", "a/b", "a\\b", "a_b", "_", "-", "ä", "अनु",
         "a*?[1]", "memory://x", "a::b", "0000000001", ".0000000001.partial", "😀", "a" * 64, "con", "~"]  # fmt: skip


def test_every_name_has_a_folder_of_plain_letters_that_is_nobody_elses():
    folders = {name: folder_of(name) for name in NAMES}
    assert len({folder.lower() for folder in folders.values()}) == len(NAMES)
    for name, folder in folders.items():
        assert set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
        assert person_of(folder) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "0 characters"),
        ("a" * 65, "65 characters"),
        ("अ" * 60, "540 bytes when written as a folder"),
        ("a\n", "cannot be seen"),
        ("a\0b", "cannot be seen"),
        ("anna\u200b", "cannot be seen"),
        ("\u202eanna", "cannot be seen"),
        ("\ud800", "cannot be seen"),
        (" anna", "a space at its beginning or end"),
        ("a\u0301", "composed form"),
        (None, "must be a text, not NoneType"),
        (7, "must be a text, not int"),
    ],
)
def test_other_names_are_refused_in_one_line(name, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        check_person(name)
    assert "\n" not in str(refused.value)
    assert str(refused.value).isascii()
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("folder", ["Anna", "_4", "_zz", "_61", "a.b", "..", "", "_ff", "lost+found", ".x"])
def test_folders_that_are_nobodys_are_told_apart(folder):
    assert person_of(folder) is None


def test_names_that_people_take_for_one_another_look_alike():
    assert look_alike("Anna") == look_alike("ANNA") == look_alike("ａｎｎａ")
    assert look_alike("anna") != look_alike("anne")
