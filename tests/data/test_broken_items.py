"""Data: a broken item is named and skipped, more than 5 % of them stop the run, however small the dataset."""

import json
from pathlib import Path

import pytest
import torch

from finetune.data.broken import BrokenData
from finetune.data.loader import EvalLoader, TrainLoader
from finetune.data.reader import ItemReader
from finetune.data.segments import Listing
from tests.support.datasets import make_tokenizer, run_args, take, write_dataset


@pytest.fixture
def some_broken(tmp_path):
    """Makes a list of `number` lines, the first `broken` of which name mono files; two files behind all of them."""

    def make(number: int, broken: int, name: str = "list") -> Path:
        write_dataset(tmp_path, 2)
        write_dataset(tmp_path, broken, "mono", **{f"mono{index}": "mono" for index in range(broken)})
        stems = [f"mono{index}" for index in range(broken)] + [f"train{index % 2}" for index in range(number - broken)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"path": f"{stem}.wav", "duration": 0.32}) + "\n" for stem in stems))
        return path

    return make


@pytest.mark.parametrize("kind", ["mono", "malformed"])
def test_a_broken_item_is_named_and_replaced_and_read_only_once(tmp_path, codec, caplog, kind):
    good = take(TrainLoader(run_args(write_dataset(tmp_path / "good", 20), 20, False), make_tokenizer(codec, 0.32)), 2)
    path = write_dataset(tmp_path / "bad", 20, train1=kind)
    tokenizer = make_tokenizer(codec, 0.32)
    loader = TrainLoader(run_args(path, 20, False), tokenizer)
    batches = take(loader, 2)
    others = [0, *range(2, 20)]
    assert torch.equal(batches[:, others], good[:, others])
    assert torch.equal(batches[:, 1], good[:, 2])  # by the next one
    assert loader.state_dict()["consumed"] == 40
    (warning,) = caplog.messages  # once, though it came twice
    assert str(tmp_path / "bad" / "train1") in warning
    assert [stem for stem, _ in tokenizer.asked].count("train1") == 1


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("number", "broken"), [(20, 1), (40, 2), (140, 7)])
def test_five_percent_go_on_for_any_number_of_epochs(some_broken, codec, caplog, number, broken, shuffle):
    tokenizer = make_tokenizer(codec, 0.32)
    take(TrainLoader(run_args(some_broken(number, broken), number, shuffle), tokenizer), 4)
    assert sorted(message.split(".wav")[0].split("/")[-1] for message in caplog.messages) == [
        f"mono{index}" for index in range(broken)
    ]
    assert sum(stem.startswith("mono") for stem, _ in tokenizer.asked) == broken


@pytest.mark.parametrize(("number", "broken"), [(4, 1), (19, 1), (39, 2), (139, 7)])
def test_more_than_five_percent_stop_the_run_within_the_epoch(some_broken, codec, number, broken):
    path = some_broken(number, broken)
    args = run_args(path, 1)
    args.max_steps = number
    loader = TrainLoader(args, make_tokenizer(codec, 0.32))
    with pytest.raises(
        BrokenData, match=rf"{broken} of {number} items are broken, more than 5%.*data check {path}.*1 c"
    ):
        take(loader, number)
    assert loader.consumed <= number
    with pytest.raises(BrokenData):  # for good
        next(loader)


def test_a_broken_file_that_is_listed_twice_is_two_broken_items(some_broken, codec):
    path = some_broken(20, 1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[:-1]]))
    with pytest.raises(BrokenData, match="2 of 20 items"):
        take(TrainLoader(run_args(path, 20), make_tokenizer(codec, 0.32)), 1)


def test_segments_are_items(tmp_path, codec):
    path = write_dataset(tmp_path, 2, steps=80)  # 20 segments each
    path.write_text(path.read_text().replace("train1.wav", "short.wav"))
    write_dataset(tmp_path, 1, "short", steps=70)
    for end in ("wav", "json"):
        (tmp_path / f"short0.{end}").rename(tmp_path / f"short.{end}")
    take(TrainLoader(run_args(path, 20), make_tokenizer(codec, 0.32)), 4)  # 2 of 40 lie behind the end of the file
    path.write_text(path.read_text().splitlines()[1])
    with pytest.raises(BrokenData, match="2 of 20 items"):
        take(TrainLoader(run_args(path, 20), make_tokenizer(codec, 0.32)), 1)


def test_items_of_all_sources_are_counted_together_but_a_source_must_have_some(tmp_path, some_broken, codec):
    large, small = some_broken(200, 0), some_broken(4, 1, "small")
    take(TrainLoader(run_args(f"{large},{small}", 10), make_tokenizer(codec, 0.32)), 4)
    small.write_text(small.read_text().splitlines()[0])
    loader = TrainLoader(run_args(f"{large},{small}", 10), make_tokenizer(codec, 0.32))
    with pytest.raises(BrokenData, match=r"small\.jsonl has no usable item"):
        next(loader)
    large.write_text("")
    with pytest.raises(BrokenData, match=r"list\.jsonl has no usable item"):
        TrainLoader(run_args(large), make_tokenizer(codec, 0.32))


def test_missing_and_broken_items_are_counted_together(some_broken, codec, caplog):
    path = some_broken(40, 2)
    text = path.read_text()
    path.write_text(text.replace("mono0", "gone"))
    loader = TrainLoader(run_args(path, 40), make_tokenizer(codec, 0.32))
    take(loader, 1)
    assert f"{path}:1: {path.parent / 'gone.wav'}: no such file" in caplog.text
    path.write_text(text.replace("mono0", "gone") + "nonsense\n")
    loader = TrainLoader(run_args(path, 41), make_tokenizer(codec, 0.32))
    with pytest.raises(BrokenData, match="3 of 41 items"):
        next(loader)


def test_broken_lines_are_named_and_too_many_refused_at_once(tmp_path, codec, caplog):
    path = write_dataset(tmp_path, 30, train7="line")
    assert len(TrainLoader(run_args(path), make_tokenizer(codec, 0.32)).listing.segments[0]) == 29
    assert f"{path}:8: not a valid line" in caplog.text
    with pytest.raises(BrokenData, match="1 of 4 items are broken"):
        TrainLoader(run_args(write_dataset(tmp_path, 4, train2="line")), make_tokenizer(codec, 0.32))


@pytest.mark.parametrize(("steps", "stops"), [(120, True), (140, False)])
def test_a_run_of_less_than_an_epoch_stops_for_five_percent_of_its_own_items(some_broken, codec, steps, stops):
    args = run_args(some_broken(1000, 7), 1, shuffle=False)  # the seven come first; 5 % of 140 are 7
    args.max_steps = steps
    loader = TrainLoader(args, make_tokenizer(codec, 0.32))
    if stops:
        with pytest.raises(BrokenData, match="7 items are broken, more than 5% of the 120 of this run"):
            next(loader)
    else:
        take(loader, 10)


def test_a_short_run_does_not_stop_for_one_broken_item_of_a_good_list(some_broken, codec):
    args = run_args(some_broken(20, 1), 2, shuffle=False)
    args.max_steps = 2
    loader = TrainLoader(args, make_tokenizer(codec, 0.32))
    codes = take(loader, 2).flatten(0, 1)
    assert all((item != loader.tokenizer.zero_id).any() for item in codes), "a blank item stands for a broken one"
    broken, good = loader.listing.segments[0][:2]
    assert loader.tokenizer.asked.count((broken.path.stem, broken.first_step)) == 1
    assert (good.path.stem, good.first_step) in loader.tokenizer.asked


def test_what_another_rank_found_counts_and_is_not_read_again(some_broken, codec):
    path, found, tokenizers = some_broken(39, 2), [], [make_tokenizer(codec, 0.32) for _ in range(2)]
    first, second = (
        ItemReader(Listing(str(path), tokenizer), tokenizer, gather=lambda new: [*found, *new])
        for tokenizer in tokenizers
    )
    one, other = first.listing.segments[0][:2]
    assert first.read(one) is None
    first.check()  # 1 of 39
    found.append((one, "as the first rank says"))
    second.check()
    assert second.read(one) is None
    assert tokenizers[1].asked == []
    assert second.read(other) is None
    with pytest.raises(BrokenData, match="2 of 39 items"):
        second.check()


def test_a_broken_item_of_evaluation_is_a_blank_row_and_more_than_five_percent_stop(some_broken, codec, caplog):
    loader = EvalLoader(run_args("", 20, eval_data=some_broken(20, 1)), make_tokenizer(codec, 0.32))
    for _ in range(3):
        (batch,) = loader
        assert (batch.codes == -1).flatten(1).all(1).tolist() == [True] + [False] * 19
    (warning,) = caplog.messages
    assert "mono0.wav" in warning
    loader = EvalLoader(run_args("", 4, eval_data=some_broken(19, 1)), make_tokenizer(codec, 0.32))
    with pytest.raises(BrokenData, match="1 of 19 items are broken"):
        list(loader)
