"""The pieces of the demo: dialogues in which words return, who predicts them, the table, the verdict and the figure.

The whole of it, with its trainings, is `make demo`.
"""

import json

import pytest
import torch

from example import demo, memory_at_work
from example.make_dialogues import PAUSE, main, recorded_words
from finetune.common.errors import UserError
from finetune.data.tokenize import SpeechTokenizer
from tests.support.models import randomise_targets, tiny_model
from tests.support.tiny_repository import ROOT

WORDS = 6
MODEL = {"text_card": 96, "card": 64, "context": 16, "num_layers": 2, "dtype": torch.float32}
TTT = {"ttt_enabled": True, "ttt_layers": "all", "ttt_chunk_size": 16, "ttt_learning_rate": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    main([str(folder), "--train", "6", "--eval", "2", "--seed", "3"])
    return folder


@pytest.fixture(scope="module")
def spoken(folder, codec):
    return memory_at_work.read_spoken(folder / "eval.jsonl", tokenizer_of(codec))


def tokenizer_of(codec) -> SpeechTokenizer:
    mimi, text = codec
    return SpeechTokenizer(mimi, text, n_q=4, dep_q=2, duration_sec=9.2)


def alignments(path) -> list:
    return json.loads(path.with_suffix(".json").read_text())["alignments"]


def test_moshi_says_the_same_words_before_and_after_the_user_talks(folder):
    said = []
    for path in sorted(folder.glob("*.wav")):
        words = alignments(path)
        speakers = [speaker for _, _, speaker in words]
        assert speakers == ["SPEAKER_MAIN"] * WORDS + ["SPEAKER_USER"] * (WORDS + 1) + ["SPEAKER_MAIN"] * WORDS
        first, again = words[:WORDS], words[-WORDS:]
        assert [word for word, *_ in first] == [word for word, *_ in again]
        assert len({word for word, *_ in first}) == WORDS
        said.append(tuple(word for word, *_ in first))
    assert len(set(said)) == len(said) == 8, "no dialogue of one list is in another"


def test_a_word_returns_after_what_all_attention_layers_together_reach(folder):
    for path in folder.glob("*.wav"):
        words = alignments(path)
        starts = [start for _, (start, _), speaker in words if speaker == "SPEAKER_MAIN"]
        ago = [(later - earlier) * 12.5 for earlier, later in zip(starts[:WORDS], starts[WORDS:], strict=True)]
        reach, delay = demo.BASE["num_layers"] * (16 - 1), max(demo.BASE["delays"])
        assert min(ago) > reach + delay + 2


def test_the_same_seed_gives_the_same_dialogues_and_another_seed_others(folder, tmp_path):
    for seed in (3, 4):
        main([str(tmp_path / str(seed)), "--train", "6", "--eval", "2", "--seed", str(seed)])
    files = sorted(path.name for path in folder.iterdir())
    assert all((tmp_path / "3" / name).read_bytes() == (folder / name).read_bytes() for name in files)
    name = "train_0000.json"
    assert (tmp_path / "4" / name).read_bytes() != (folder / name).read_bytes()


def test_a_returning_word_has_the_codes_it_had_the_first_time(spoken):
    """Once Mimi no longer hears what was before it: its convolutions look back by some steps."""
    for codes, words in zip(spoken.codes, spoken.words, strict=True):
        for (first, _), (again, _) in zip(words[1:WORDS], words[WORDS + 1 :], strict=True):
            same = codes[1, first : first + 3] == codes[1, again : again + 3]
            assert same.float().mean() > 0.5


def test_moshis_words_are_found_in_the_text_row(folder, codec, spoken):
    for line, codes, places in zip((folder / "eval.jsonl").open(), spoken.codes, spoken.words, strict=True):
        words = [
            word for word, _, speaker in alignments(folder / json.loads(line)["path"]) if speaker == "SPEAKER_MAIN"
        ]
        tokens = [codes[0, at : at + number].tolist() for at, number in places]
        assert [codec[1].decode(found) for found in tokens] == words


def test_updates_change_nothing_before_the_first_of_them_and_what_returns_after_it(spoken, patched):
    model = randomise_targets(tiny_model(**MODEL, **TTT))
    on, off = (memory_at_work.listen(model, spoken, updates) for updates in (True, False))
    early = [step + tokens <= 16 for step, tokens in spoken.words[0]]
    assert any(early)
    assert on["nats"][0][early] == pytest.approx(off["nats"][0][early], rel=1e-5)
    assert (on["nats"][:, WORDS:] != off["nats"][:, WORDS:]).all()
    assert on["delta"][0] == 0 < on["delta"][-1]
    assert not any(off["delta"])
    assert on["seconds"][-1] == pytest.approx(spoken.codes.shape[2] * 0.08)


def test_a_model_without_ttt_can_be_listened_to(spoken, patched):
    found = memory_at_work.listen(tiny_model(**MODEL), spoken)
    assert found["nats"].shape == (2, 2 * WORDS)
    assert (found["nats"] > 0).all()
    assert found["delta"] == []


def heard(again_with_ttt: list[float]) -> dict:
    """What `listen` finds in four dialogues of two words each: 3 nats everywhere but for what returns with TTT."""
    plain = {"nats": torch.full((4, 4), 3.0).numpy(), "delta": [0.0, 0.2], "seconds": [0.32, 0.64]}
    nats = plain["nats"].copy()
    nats[:, 2:] = torch.tensor(again_with_ttt)[:, None].numpy()
    return {"control": plain, "off": plain, "on": plain | {"nats": nats}}


SPOKEN = memory_at_work.Spoken(torch.zeros(4, 1, 8), [[(0, 1), (2, 1), (4, 1), (6, 1)]] * 4)


@pytest.mark.parametrize(
    ("again", "sentence"),
    [
        (
            [1.0, 1.0, 1.0, 1.0],
            "It remembers: with TTT a word that returns costs 2.00 nats less than without, in 4 of 4",
        ),
        ([1.0, 1.0, 3.5, 3.5], "It does not remember: with TTT less without, a word that returns costs -0.75 nats"),
        ([4.0, 4.0, 4.0, 4.0], "It does not remember: with TTT less without, a word that returns costs +1.00 nats"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(again, sentence):
    found = memory_at_work.summarise(heard(again), SPOKEN)
    assert demo.verdict(found).startswith(sentence)
    assert found["again"]["on"] == pytest.approx(sum(again) / 4)
    assert demo.table(found).splitlines()[-1].split() == ["with", "TTT", "3.00", f"{found['again']['on']:.2f}"]


def test_the_figure_is_small_and_drawn_from_what_the_demo_wrote(tmp_path):
    runs = [{"seed": seed, **memory_at_work.summarise(heard([1.0 + seed] * 4), SPOKEN)} for seed in (0, 1)]
    (tmp_path / "demo.json").write_text(json.dumps({"runs": runs}))
    memory_at_work.main([str(tmp_path / "demo.json"), str(tmp_path / "memory.png")])
    picture = (tmp_path / "memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 100_000


def test_the_committed_seeds_agree():
    runs = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    assert all(run["better"] == run["dialogues"] == 24 for run in runs)
    assert max(run["again"]["on"] - run["again"]["control"] for run in runs) < -2
    assert (ROOT / "docs" / "memory_at_work.png").stat().st_size < 100_000


def test_a_training_that_fails_ends_the_demo_with_what_it_said(tmp_path, monkeypatch):
    (tmp_path / "fail.py").write_text("print('no such base'); raise SystemExit(2)")
    monkeypatch.setattr(demo, "TRAIN", tmp_path / "fail.py")
    with pytest.raises(UserError, match=r"no such base .*train\.log"):
        demo.train(tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--words", "1"], "words=1: must be from 2 to 31"),
        (["--words", "32"], "words=32: must be"),
        (["--train", "0"], "train=0: must be from 1"),
        (["--words", "2", "--train", "10", "--eval", "200"], "eval=200: must be from 1 to 105 with 2 words"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_dialogues_that_cannot_be_made_are_refused_in_one_line(tmp_path, words, named, capsys):
    assert main([str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert named in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_word_of_the_example_has_a_recording():
    known = recorded_words()
    assert {speaker: len(words) for speaker, words in known.items()} == {"SPEAKER_MAIN": 33, "SPEAKER_USER": 32}
    assert all(len(pcm) > 24_000 // 10 for words in known.values() for pcm in words.values())
    assert PAUSE > 0
