"""The benchmarks' published layouts are read as they lie, and what is wrong with them is named."""

import json

import pytest

from example.make_pairs import make_benchmarks
from finetune.common.errors import ConfigError
from finetune.evaluation.published.sets import load_files, load_pairs
from finetune.settings.evaluation import EvalArgs, PaperArgs
from finetune.settings.parsing import build
from tests.support.tiny_repository import ROOT as REPOSITORY

ROOT = str(REPOSITORY)

LEXICAL = "id,filename,voice,frequency,word,phones,length,correct"
SYNTACTIC = "id,filename,voice,type,subtype,transcription,correct"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("benchmarks"), items=4, longform_seconds=4.0)


def gold(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gold.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("below", [".", "lexical", "lexical/dev"])
def test_swuggy_is_found_from_any_folder_of_its_data_set(benchmarks, below):
    found = load_pairs("swuggy", benchmarks / "sLM21-dataset" / below)
    assert len(found.pairs) == 4 * 2
    assert not found.problems
    assert {pair.item for pair in found.pairs} == {"0", "1", "2", "3"}
    assert all(pair.correct.is_file() and pair.incorrect.is_file() for pair in found.pairs)


def test_sblimp_and_swuggy_of_one_data_set_are_told_apart(benchmarks):
    found = load_pairs("sblimp", benchmarks / "sLM21-dataset")
    assert {pair.correct.parent.parent.name for pair in found.pairs} == {"syntactic"}
    assert {pair.groups["type"] for pair in found.pairs} == {"rise", "return"}
    with pytest.raises(ConfigError, match=r"paper\.sblimp=.*gold\.csv \(in it, or in syntactic/test below it\)"):
        load_pairs("sblimp", benchmarks / "sLM21-dataset", split="test")


def test_a_word_and_its_non_word_are_those_of_one_id_and_voice(tmp_path):
    folder = gold(
        tmp_path / "lexical" / "dev",
        LEXICAL,
        "7,aaa,A,,sloth,s l o,3,1",
        "7,bbb,B,,sloth,s l o,3,1",
        "7,ccc,B,,slith,s l i,3,0",
        "7,ddd,A,,slith,s l i,3,0",
        "9,eee,A,120,word,w o,2,0",
        "9,fff,A,120,werd,w e,2,1",
    )
    (folder / "aaa.flac").touch()
    pairs = load_pairs("swuggy", tmp_path).pairs
    assert [(pair.correct.name, pair.incorrect.name) for pair in pairs] == [
        ("aaa.flac", "ddd.wav"),
        ("bbb.wav", "ccc.wav"),
        ("fff.wav", "eee.wav"),
    ]
    assert pairs[0].groups == {"vocabulary": "oov", "frequency": "oov", "phones": "3"}
    assert pairs[2].groups == {"vocabulary": "in vocabulary", "frequency": "100+", "phones": "2"}


def test_several_pairs_of_one_id_and_voice_are_matched_by_their_order(tmp_path):
    folder = gold(tmp_path, SYNTACTIC, *(f"1,{name},A,t,s,x,{side}" for name, side in zip("abcd", "1100", strict=True)))
    pairs = load_pairs("sblimp", folder).pairs
    assert [(pair.correct.stem, pair.incorrect.stem) for pair in pairs] == [("a", "c"), ("b", "d")]
    assert len({pair.id for pair in pairs}) == 2


def test_ids_that_repeat_in_other_types_are_other_sentences(tmp_path):
    rows = [f"1,{kind}{side},A,{kind},sub,x,{side}" for kind in ("binding", "agreement") for side in (1, 0)]
    pairs = load_pairs("sblimp", gold(tmp_path, SYNTACTIC, *rows)).pairs
    assert [(pair.item, pair.correct.stem, pair.incorrect.stem) for pair in pairs] == [
        ("binding/sub/1", "binding1", "binding0"),
        ("agreement/sub/1", "agreement1", "agreement0"),
    ]


def test_rows_without_a_partner_or_a_side_are_named_with_their_lines(tmp_path):
    rows = ["1,a,A,t,s,x,1", "1,b,A,t,s,x,0", "2,c,A,t,s,x,1", "3,d,A,t,s,x,yes"]
    found = load_pairs("sblimp", gold(tmp_path, SYNTACTIC, *rows))
    assert len(found.pairs) == 1
    alone, odd = sorted(found.problems, key=lambda problem: "lines" not in problem)
    assert "gold.csv: lines 4: not as many correct as incorrect" in alone
    assert "gold.csv:5: needs an id, a filename, and 0 or 1 as correct" in odd


@pytest.mark.parametrize("kind", ["sstorycloze", "tstorycloze"])
def test_the_two_endings_of_a_story_are_paired_though_their_numbers_differ(benchmarks, kind):
    pairs = load_pairs(kind, benchmarks).pairs
    folder = {"sstorycloze": "sSC", "tstorycloze": "tSC"}[kind]
    assert [pair.id for pair in pairs] == [f"story-{number:04d}" for number in range(4)]
    assert pairs[1].correct == benchmarks / folder / "2_story-0001_correct.wav"
    assert pairs[1].incorrect == benchmarks / folder / "3_story-0001_incorrect.wav"


@pytest.mark.parametrize("names", [("17", "18"), ("3_1", "3_2", "4_1"), ("a_b", "b_a")])
def test_endings_of_one_name_are_paired_by_the_whole_name(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}_correct.wav").touch()
        (tmp_path / f"{name}_incorrect.wav").touch()
    found = load_pairs("sstorycloze", tmp_path)
    assert sorted(pair.id for pair in found.pairs) == sorted(names)
    assert not found.problems


def test_a_story_with_one_ending_is_named(tmp_path):
    for name in ("1_correct", "1_incorrect", "2_correct"):
        (tmp_path / f"{name}.wav").touch()
    found = load_pairs("tstorycloze", tmp_path)
    assert [pair.id for pair in found.pairs] == ["1"]
    assert "2_correct.wav" in found.problems[0]


def test_a_list_names_its_pairs_relative_to_itself(tmp_path):
    lines = [
        '{"id": 1, "correct": "a/x.wav", "incorrect": "/abs/y.wav", "group": "short"}',
        "",
        '{"id": "two", "correct": "x.wav", "incorrect": "y.wav", "item": "said"}',
        '{"id": "two", "correct": "x.wav", "incorrect": "y.wav"}',
        '{"id": "three", "correct": "x.wav"}',
        "[1]",
        "{",
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    found = load_pairs("swuggy", tmp_path / "list.jsonl")
    assert [(pair.id, pair.item, pair.groups) for pair in found.pairs] == [
        ("1", "1", {"group": "short"}),
        ("two", "said", {}),
    ]
    assert found.pairs[0].correct == tmp_path / "a" / "x.wav"
    assert str(found.pairs[0].incorrect) == "/abs/y.wav"
    for problem, (line, text) in zip(
        found.problems,
        [(4, "stands in line 3 too"), (5, "incorrect=None"), (6, "must be an object"), (7, "not valid JSON")],
        strict=True,
    ):
        assert f"list.jsonl:{line}: " in problem
        assert text in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a .jsonl list of pairs, or a folder with a gold.csv"),
        ("id,filename,correct\n1,a,1\n", "gold.csv: no columns voice"),
        ("id,filename,voice,correct\n", "no columns|not one pair"),
        ("id,filename,voice,correct\n1,a,A,1\n", "not one pair in it. .*lines 2: not as many"),
    ],
    ids=["empty folder", "column missing", "no rows", "no pair left"],
)
def test_a_folder_that_is_no_data_set_says_what_is_missing(tmp_path, content, message):
    if content:
        (tmp_path / "gold.csv").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_pairs("swuggy", tmp_path)
    assert f"paper.swuggy='{tmp_path}'" in str(caught.value)


def test_long_files_are_found_as_libri_light_has_them_or_by_a_list(benchmarks, tmp_path):
    folder = benchmarks / "longform"
    files = load_files(folder)
    assert [file.relative_to(folder).parts[:2] for file in files] == [(f"{100 + n}", f"book_{n}") for n in range(3)]
    listed = tmp_path / "files.jsonl"
    listed.write_text(json.dumps({"path": str(files[1]), "duration": 3.0}) + "\n" + '{"path": "here.flac"}\n')
    assert load_files(listed) == [files[1], tmp_path / "here.flac"]
    listed.write_text('{"file": "here.flac"}\n')
    with pytest.raises(ConfigError, match=r"paper\.longform=.*line 1: path=None"):
        load_files(listed)
    with pytest.raises(ConfigError, match="no audio files"):
        load_files(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"paper\.swuggy=None: no data set is given; set one of swuggy, sblimp"),
        ({"swuggy": "/nowhere"}, r"paper\.swuggy='/nowhere': no such file or folder"),
        ({"longform": __file__}, r"paper\.longform=.*must be a folder or a \.jsonl list"),
        ({"swuggy": ROOT, "split": "train"}, r"paper\.split='train': must be one of dev, test"),
        ({"swuggy": ROOT, "codebooks": "semantic"}, r"paper\.codebooks='semantic': must be one of first, all"),
        ({"swuggy": ROOT, "normalise": "length"}, r"paper\.normalise='length': must be one of mean, sum"),
        ({"swuggy": ROOT, "max_items": 0}, r"paper\.max_items=0: must be a whole number from 1 to .*, or null"),
        ({"swuggy": ROOT, "batch_steps": 0}, r"paper\.batch_steps=0: must be a whole number from 1 to"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        PaperArgs(**settings).validate()


def test_the_settings_are_a_section_of_an_evaluation():
    args = build(EvalArgs, {"eval_type": "paper", "paper": {"sblimp": "/nowhere", "codebooks": "all"}})
    assert args.paper == PaperArgs(sblimp="/nowhere", codebooks="all")
    with pytest.raises(ConfigError, match=r"paper\.sblimp='/nowhere'"):
        args.validate()
    with pytest.raises(ConfigError, match="sblmip"):
        build(EvalArgs, {"paper": {"sblmip": "/nowhere"}})
