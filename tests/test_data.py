"""Data: the text row by hand, codes of real audio, one order for all ranks, exact resume, broken files."""

import copy
import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.models import loaders

from finetune.args import TrainArgs
from finetune.data import loader as loader_module
from finetune.data.__main__ import main as data_main
from finetune.data.encode import encode
from finetune.data.interleave import text_row
from finetune.data.loader import BrokenData, EvalLoader, TrainLoader
from finetune.data.manifest import parse_sources, read_entries, read_transcript
from finetune.data.tokenize import BrokenItem, Segment, SpeechTokenizer, resample
from finetune.loss import compute_loss

from .fixtures_repo import DATA, build_repo
from .models import tiny_model

RATE, FRAME = 24_000, 1920
N_Q, DEP_Q = 8, 4


class Words:
    """A text tokenizer whose tokens can be read: `{"word": [ids]}`."""

    def __init__(self, tokens):
        self.tokens = tokens

    def encode(self, text):
        return self.tokens[text]


MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"
DOZEN = [
    ("so", (1.20, 1.40), MAIN),  # not sorted; step 15
    ("hello", (0.00, 0.28), MAIN),  # step 0: no step before it
    (" my ", (0.30, 0.32), MAIN),  # step 3, after padding
    ("boat", (0.33, 0.49), MAIN),  # step 4, right after; its third token and all after it are dropped
    ("is", (0.40, 0.60), USER),  # not Moshi
    ("called", (0.50, 0.55), MAIN),  # step 6; its second token falls to the next word
    ("Nim", (0.57, 0.59), MAIN),  # step 7, all of it falls to the next word, of the same step
    ("bus", (0.60, 0.70), MAIN),  # step 7
    ("uh", (0.75, 0.75), MAIN),  # no duration
    ("yes", (0.96, 1.00), MAIN),  # step 12, exactly at its start
    ("back", (1.10, 1.00), MAIN),  # negative duration
    ("long", (1.52, 1.60), MAIN),  # step 19, the last; its second token is cut off
    ("late", (1.60, 1.70), MAIN),  # step 20, outside
]
TOKENS = {
    "hello": [10, 11],
    "my": [12],
    "boat": [13, 14, 15, 27, 28, 29],
    "called": [16, 17],
    "Nim": [18],
    "bus": [19, 20],
    "yes": [21],
    "so": [22, 23],
    "long": [24, 25],
    "late": [26],
}
ROW = [10, 11, 0, 12, 13, 14, 16, 19, 20, 3, 3, 0, 21, 3, 0, 22, 23, 3, 0, 24]


def test_text_row_of_a_dozen_words():
    row = text_row(DOZEN, Words(TOKENS), 20)
    assert row.dtype == torch.int64
    assert row.tolist() == [ROW]


@pytest.mark.parametrize("first", [1, 7, 12, 15])
def test_a_word_falls_in_the_same_step_wherever_the_file_is_cut(first):
    row = text_row(DOZEN, Words(TOKENS), 20 - first, first_step=first)[0].tolist()
    begins = [10, 12, 13, 16, 19, 21, 22, 24]  # first tokens that are placed
    started = next(i for i in range(first, 20) if ROW[i] in begins)
    assert row[started - first :] == ROW[started:]
    assert set(row[: started - first]) <= {0, 3}  # words that started before the cut are left out


def test_without_words_the_row_is_padding():
    assert text_row([], Words({}), 3).tolist() == [[3, 3, 3]]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = build_repo(tmp_path_factory.mktemp("repo"))
    config = json.loads((folder / "mimi_config.json").read_text())
    mimi = loaders.get_mimi(folder / "mimi.safetensors", config, num_codebooks=DEP_Q)
    return mimi, loaders.sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


@pytest.fixture
def tokenizer(repo):
    return make_tokenizer(repo)


class Recording(SpeechTokenizer):
    """The real one; remembers which segments it was asked for."""

    def __call__(self, segment):
        self.asked.append((segment.path.stem, segment.first_step))
        return super().__call__(segment)


def make_tokenizer(repo, duration_sec=4.0, **kwargs) -> Recording:
    tokenizer = Recording(*repo, n_q=N_Q, dep_q=DEP_Q, duration_sec=duration_sec, **kwargs)
    tokenizer.asked = []
    return tokenizer


@torch.no_grad()
def test_codes_are_text_then_moshi_then_user_and_the_rest_is_zero_tokens(repo, tokenizer):
    mimi, _ = repo
    (entry,) = read_entries(DATA / "eval.jsonl")[0]
    segments = tokenizer.segments(entry)
    assert [segment.first_step for segment in segments] == [0, 50, 100]  # 11.6 s are 145 steps
    codes = tokenizer(segments[2]).codes
    assert (codes.shape, codes.dtype) == ((1, 1 + N_Q, 50), torch.int64)
    pcm = torch.from_numpy(loaders_read(entry.path))[:, 100 * FRAME :]
    moshi, user = mimi.encode(pcm[:, None])
    assert torch.equal(codes[0, 1 : 1 + DEP_Q, :45], moshi)
    assert torch.equal(codes[0, 1 + DEP_Q :, :45], user)
    assert not torch.equal(moshi, user)
    words = read_transcript(entry.path.with_suffix(".json")).alignments
    assert torch.equal(codes[0, :1, :45], text_row(words, tokenizer.text_tokenizer, 45, first_step=100))
    assert (codes[0, :, 45:] == -1).all()
    assert (codes[0, :, :45] >= 0).all()


@pytest.mark.parametrize("block_steps", [1, 7, 40, 144])
@torch.no_grad()
def test_a_recording_encoded_in_blocks_has_the_codes_of_one_pass(repo, block_steps):
    mimi = copy.deepcopy(repo[0]).double()  # this random one's codewords lie so close that float32 would decide
    pcm = torch.from_numpy(loaders_read(DATA / "sister.wav")).double()[:, None, :-100]  # the last frame is not whole
    codes = mimi.encode(pcm)
    assert codes.shape[2] == 145
    assert mimi.encoder_transformer.transformer.layers[0].self_attn.context < 2 * 145, "the window is never full"
    assert torch.equal(encode(mimi, pcm, block_steps), codes)
    assert torch.equal(mimi.encode(pcm), codes), "something was left behind"


def loaders_read(path: Path) -> np.ndarray:
    """`[2, samples]` by the standard library."""
    with wave.open(str(path)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
        return np.ascontiguousarray(pcm.reshape(-1, file.getnchannels()).T) / 32768


@torch.no_grad()
def test_padding_carries_no_loss(tokenizer):
    (entry,) = read_entries(DATA / "eval.jsonl")[0]
    model = tiny_model(torch.float32, n_q=N_Q, dep_q=DEP_Q, card=64, text_card=96, delays=[0] * (1 + N_Q))
    codes = tokenizer(tokenizer.segments(entry)[2]).codes
    padded = compute_loss(model(codes), codes, dep_q=DEP_Q)
    cut = compute_loss(model(codes[..., :45]), codes[..., :45], dep_q=DEP_Q)
    torch.testing.assert_close(padded.sums, cut.sums, rtol=1e-5, atol=0)
    assert torch.equal(padded.weights, cut.weights)


def test_an_item_is_the_same_from_the_cache(repo):
    tokenizer = make_tokenizer(repo, cache_items=1)
    first, second = tokenizer.segments(read_entries(DATA / "eval.jsonl")[0][0])[:2]
    one = tokenizer(first).codes
    assert torch.equal(one, tokenizer(first).codes)
    tokenizer(second)
    assert list(tokenizer._cache) == [second]
    assert torch.equal(one, tokenizer(first).codes)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_resampling_is_in_time(rate):
    pcm = np.zeros((2, rate), dtype=np.float32)
    pcm[0, rate // 4] = pcm[1, -rate // 100] = 1
    out = resample(pcm, rate, RATE)
    assert out.shape == (2, RATE)
    assert abs(np.abs(out[0]).argmax() - RATE // 4) <= 1
    assert abs(np.abs(out[1]).argmax() - (RATE - RATE // 100)) <= 1


@pytest.mark.parametrize(
    ("n_q", "dep_q", "named"), [(8, 8, "dep_q=8, n_q=8"), (8, 0, "dep_q=0"), (10, 5, "num_codebooks=4")]
)
def test_models_that_are_no_dialogue_are_refused(repo, n_q, dep_q, named):
    with pytest.raises(ValueError, match=named):
        SpeechTokenizer(*repo, n_q=n_q, dep_q=dep_q, duration_sec=4)


def write_dataset(folder: Path, number: int, name: str = "train", steps: int = 4, **broken: str) -> Path:
    """A list of `number` files of noise and one word each. `broken` maps names of files to what is wrong with them."""
    folder.mkdir(exist_ok=True, parents=True)
    generator, lines = np.random.default_rng(0), []
    for index in range(number):
        stem = f"{name}{index}"
        kind = broken.get(stem)
        channels = 1 if kind == "mono" else 2
        pcm = (generator.standard_normal((steps * FRAME, 2))[:, :channels] * 3000).astype("<i2")
        with wave.open(str(folder / f"{stem}.wav"), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(pcm.tobytes())
        if kind == "gone":
            (folder / f"{stem}.wav").unlink()
        alignments = [["boat", [0.1, 0.2], MAIN], ["name", [0.2, 0.3], USER]]
        if kind == "unsorted":
            alignments.reverse()
        text = "{" if kind == "malformed" else json.dumps({"alignments": alignments})
        if kind != "silent":
            (folder / f"{stem}.json").write_text(text)
        duration = steps * FRAME / RATE * (2 if kind == "long" else 1)
        lines.append("nonsense" if kind == "line" else json.dumps({"path": f"{stem}.wav", "duration": duration}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_args(train_data: str, batch_size: int = 2, shuffle: bool = True, eval_data: str = "") -> TrainArgs:
    args = TrainArgs(run_dir="run", seed=5, batch_size=batch_size)
    args.data.train_data, args.data.eval_data, args.data.shuffle = str(train_data), str(eval_data), shuffle
    return args


def take(loader, batches: int) -> torch.Tensor:
    """The next `batches` as `[batches, B, K, T]`."""
    return torch.stack([next(loader).codes for _ in range(batches)])


def test_every_epoch_has_every_item_once_in_an_order_of_its_own(tmp_path, repo):
    path = write_dataset(tmp_path, 6)
    orders = {}
    for shuffle in (False, True):
        tokenizer = make_tokenizer(repo, 0.32)
        take(TrainLoader(run_args(path, 3, shuffle), tokenizer), 4)
        orders[shuffle] = [stem for stem, _ in tokenizer.asked]
        assert sorted(orders[shuffle][:6]) == sorted(orders[shuffle][6:]) == [f"train{i}" for i in range(6)]
    assert orders[False] == 2 * [f"train{i}" for i in range(6)]
    assert orders[True][:6] != orders[True][6:]


def test_ranks_share_one_order_without_overlap(tmp_path, repo):
    args, halves = run_args(write_dataset(tmp_path, 7), 4), run_args(tmp_path / "train.jsonl", 2)
    alone = take(TrainLoader(args, make_tokenizer(repo, 0.32)), 5)
    ranks = [take(TrainLoader(halves, make_tokenizer(repo, 0.32), rank=r, world_size=2), 5) for r in range(2)]
    together = torch.stack(ranks, dim=2).flatten(1, 2)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_resumed_loader_continues_with_the_next_item(tmp_path, repo, before, after):
    write_dataset(tmp_path / "a", 5)
    write_dataset(tmp_path / "b", 3)
    spec = f"{tmp_path / 'a'}:2,{tmp_path / 'b'}"
    straight = take(TrainLoader(run_args(spec, 12), make_tokenizer(repo, 0.32)), 2)

    def ranks(number):
        args = run_args(spec, 12 // number)
        return [TrainLoader(args, make_tokenizer(repo, 0.32), rank=r, world_size=number) for r in range(number)]

    stopped = ranks(before)
    for loader in stopped:
        next(loader)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in stopped]
    assert all(state == states[0] for state in states)
    assert states[0]["consumed"] == 12
    resumed = ranks(after)
    for loader in resumed:
        loader.load_state_dict(states[0])
    rest = torch.stack([next(loader).codes for loader in resumed], dim=1).flatten(0, 1)
    assert torch.equal(rest, straight[1])


def test_resuming_on_other_data_is_said_or_refused(tmp_path, repo, caplog):
    path = write_dataset(tmp_path / "a", 5)
    state = TrainLoader(run_args(path), make_tokenizer(repo, 0.32)).state_dict()
    other = TrainLoader(run_args(write_dataset(tmp_path / "b", 4)), make_tokenizer(repo, 0.32))
    other.load_state_dict(state)
    assert "items is [4], was [5]" in caplog.text
    two = TrainLoader(run_args(f"{path},{path}"), make_tokenizer(repo, 0.32))
    with pytest.raises(ValueError, match=r"2 sources.*1"):
        two.load_state_dict(state)


def test_sources_appear_by_their_weights(tmp_path, repo):
    spec = f"{write_dataset(tmp_path, 2, 'often')}:3, {write_dataset(tmp_path, 3, 'seldom')}"
    tokenizer = make_tokenizer(repo, 0.32)
    loader = TrainLoader(run_args(spec, 4), tokenizer)
    for _ in range(5):
        tokenizer.asked.clear()
        next(loader)
        assert sum(stem.startswith("often") for stem, _ in tokenizer.asked) == 3


def test_evaluation_sees_everything_once_in_order_with_equal_batches_on_every_rank(tmp_path, repo):
    args = run_args("", 2, eval_data=write_dataset(tmp_path, 5))
    asked, batches = [], []
    for rank in range(2):
        tokenizer = make_tokenizer(repo, 0.32)
        loader = EvalLoader(args, tokenizer, rank=rank, world_size=2)
        for _ in range(2):  # each iteration starts anew
            batches.append([batch.codes for batch in loader])
        assert len(loader) == len(batches[-1]) == 2
        asked.append([stem for stem, _ in tokenizer.asked])
    assert asked == [2 * ["train0", "train2", "train4"], 2 * ["train1", "train3"]]
    assert {tuple(codes.shape) for rank in batches for codes in rank} == {(2, 1 + N_Q, 4)}
    assert [(codes == -1).flatten(1).all(1).tolist() for codes in batches[2]] == [[False, False], [True, True]]


@pytest.mark.parametrize("kind", ["mono", "malformed"])
def test_a_broken_item_is_named_and_replaced(tmp_path, repo, caplog, kind):
    good = take(TrainLoader(run_args(write_dataset(tmp_path / "good", 4), 4, False), make_tokenizer(repo, 0.32)), 2)
    path = write_dataset(tmp_path / "bad", 4, train1=kind)
    loader = TrainLoader(run_args(path, 4, False), make_tokenizer(repo, 0.32))
    batches = take(loader, 2)
    assert torch.equal(batches[:, [0, 2, 3]], good[:, [0, 2, 3]])
    assert torch.equal(batches[:, 1], good[:, 2])  # by the next one
    assert loader.state_dict()["consumed"] == 8
    (warning,) = caplog.messages  # once, though it came twice
    assert str(tmp_path / "bad" / "train1") in warning


def test_more_than_five_percent_of_broken_items_stop_the_run(tmp_path, repo, monkeypatch):
    monkeypatch.setattr(loader_module, "BROKEN_MINIMUM", 10)
    loader = TrainLoader(run_args(write_dataset(tmp_path, 4, train1="mono"), 1), make_tokenizer(repo, 0.32))
    with pytest.raises(BrokenData, match=r"of 1\d items are broken.*1 channel.*finetune.data check"):
        take(loader, 20)


def test_nothing_but_broken_items_stop_the_run_at_once(tmp_path, repo):
    path = write_dataset(tmp_path, 2, train0="mono", train1="malformed")
    loader = TrainLoader(run_args(path), make_tokenizer(repo, 0.32))
    with pytest.raises(BrokenData, match="every item is broken"):
        next(loader)


def test_broken_lines_are_named_and_too_many_refused(tmp_path, repo, caplog):
    path = write_dataset(tmp_path, 30, train7="line")
    assert len(TrainLoader(run_args(path), make_tokenizer(repo, 0.32))._segments[0]) == 29
    assert f"{path}:8: not a valid line" in caplog.text
    with pytest.raises(BrokenData, match="1 of 4 lines are broken"):
        TrainLoader(run_args(write_dataset(tmp_path, 4, train2="line")), make_tokenizer(repo, 0.32))


def test_a_broken_item_of_evaluation_is_a_blank_row(tmp_path, repo, caplog):
    args = run_args("", 3, eval_data=write_dataset(tmp_path, 3, train1="mono"))
    (batch,) = EvalLoader(args, make_tokenizer(repo, 0.32))
    assert (batch.codes == -1).flatten(1).all(1).tolist() == [False, True, False]
    assert "train1" in caplog.text


def test_text_conditions_reach_the_batch_if_the_model_takes_them(tmp_path, repo):
    path = write_dataset(tmp_path, 2)
    content = json.loads((tmp_path / "train0.json").read_text())
    conditions = {"description": "very_good", "unknown": "x"}
    (tmp_path / "train0.json").write_text(json.dumps(content | {"text_conditions": conditions}))
    args = run_args(path, 2, shuffle=False)
    assert next(TrainLoader(args, make_tokenizer(repo, 0.32))).condition_attributes is None
    batch = next(TrainLoader(args, make_tokenizer(repo, 0.32, conditions=["description"])))
    assert [row.text for row in batch.condition_attributes] == [{"description": "very_good"}, {"description": None}]


def test_the_end_of_a_too_long_duration_is_broken(tmp_path, tokenizer):
    shutil.copy(DATA / "boat.wav", tmp_path)
    shutil.copy(DATA / "boat.json", tmp_path)
    with pytest.raises(BrokenItem, match=r"boat\.wav from step 200"):
        tokenizer(Segment(tmp_path / "boat.wav", 200))


def test_lists_folders_and_weights(tmp_path):
    for name in ("a.jsonl", "folder/b.jsonl", "folder/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    sources = parse_sources(f"{tmp_path}/a.jsonl:0.5,{tmp_path}/folder")
    assert [(source.weight, [file.name for file in source.files]) for source in sources] == [
        (0.5, ["a.jsonl"]),
        (1.0, ["b.jsonl", "c.jsonl"]),
    ]
    (tmp_path / "empty").mkdir()
    for spec, named in (
        (f"{tmp_path}/empty", "without any"),
        ("gone", "no such"),
        (f"{tmp_path}/a.jsonl:-1", "weight"),
    ):
        with pytest.raises(ValueError, match=named):
            parse_sources(spec)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        "\xff",
        '{"path": 3, "duration": 1}',
        '{"path": "a.wav"}',
        '{"path": "a.wav", "duration": "1"}',
        '{"path": "a.wav", "duration": -1}',
        '{"path": "a.wav", "duration": NaN}',
    ],
)
def test_bad_lines_are_problems_with_their_number(tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'\n{"path": "a.wav", "duration": 1.5}\n' + line.encode("latin-1") + b"\n")
    entries, problems = read_entries(path)
    assert [(entry.path, entry.duration, entry.line) for entry in entries] == [(tmp_path / "a.wav", 1.5, 2)]
    assert [problem.line for problem in problems] == [3]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"alignments": 1}',
        '{"alignments": [["a", [0, 1]]]}',
        '{"alignments": [["a", [0], "S"]]}',
        '{"alignments": [["a", [0, "1"], "S"]]}',
        '{"alignments": [], "text_conditions": "x"}',
    ],
)
def test_bad_transcripts_are_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"alignments|text_conditions|Expecting"):
        read_transcript(path)


def test_check_finds_every_kind_of_problem_with_its_line(tmp_path, capsys):
    kinds = ["ok", "gone", "mono", "long", "silent", "malformed", "unsorted", "line"]
    path = write_dataset(tmp_path, 8, **{f"train{i}": kind for i, kind in enumerate(kinds)})
    assert data_main(["check", str(path)]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    named = ["no such file (audio)", "mono", "duration=0.64: the file has 0.320", "no such file (alignments)"]
    named += ["malformed", "unsorted", "not a valid line"]
    assert len(problems) == len(named)
    for number, (problem, part) in enumerate(zip(problems, named, strict=True), start=2):
        assert problem.startswith(f"{path}:{number}: ")
        assert part in problem
    assert summary == "8 lines, 0.001 hours of audio, 10 words, 5 of them by SPEAKER_MAIN; 7 problems."


def test_check_as_json_and_of_the_committed_data(tmp_path, capsys):
    assert data_main(["check", str(DATA), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["problems"], report["lines"]) == (True, [], 3)
    assert data_main(["check", str(write_dataset(tmp_path, 1, train0="mono")), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["line"], problem["file"]) == (1, str(tmp_path / "train.jsonl"))


def test_check_words_in_wrong_places(tmp_path, capsys):
    path = write_dataset(tmp_path, 2)
    words = [["a", [0.2, 0.1], USER], ["b", [0.25, 0.3], USER], ["c", [9, 10], USER]]
    (tmp_path / "train0.json").write_text(json.dumps({"alignments": words}))
    assert data_main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    for part in ("alignments[0]", "ends before it starts", "alignments[2]", "after the end", "no word by SPEAKER_MAIN"):
        assert part in out


def test_check_of_a_missing_list(capsys):
    assert data_main(["check", "gone.jsonl"]) == 2
    assert "gone.jsonl: no such" in capsys.readouterr().err
