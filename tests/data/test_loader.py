"""Data: one order for all ranks, shares of sources, exact resume, and evaluation."""

import json

import pytest
import torch

from finetune.data.loader import EvalLoader, TrainLoader
from tests.support.datasets import N_Q, make_tokenizer, run_args, take, write_dataset


def test_every_epoch_has_every_item_once_in_an_order_of_its_own(tmp_path, codec):
    path = write_dataset(tmp_path, 6)
    orders = {}
    for shuffle in (False, True):
        tokenizer = make_tokenizer(codec, 0.32)
        take(TrainLoader(run_args(path, 3, shuffle), tokenizer), 4)
        orders[shuffle] = [stem for stem, _ in tokenizer.asked]
        assert sorted(orders[shuffle][:6]) == sorted(orders[shuffle][6:]) == [f"train{i}" for i in range(6)]
    assert orders[False] == 2 * [f"train{i}" for i in range(6)]
    assert orders[True][:6] != orders[True][6:]


def test_ranks_share_one_order_without_overlap(tmp_path, codec):
    args, halves = run_args(write_dataset(tmp_path, 7), 4), run_args(tmp_path / "train.jsonl", 2)
    alone = take(TrainLoader(args, make_tokenizer(codec, 0.32)), 5)
    ranks = [take(TrainLoader(halves, make_tokenizer(codec, 0.32), rank=r, world_size=2), 5) for r in range(2)]
    together = torch.stack(ranks, dim=2).flatten(1, 2)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_resumed_loader_continues_with_the_next_item(tmp_path, codec, before, after):
    write_dataset(tmp_path / "a", 5)
    write_dataset(tmp_path / "b", 3)
    spec = f"{tmp_path / 'a'}:2,{tmp_path / 'b'}"
    straight = take(TrainLoader(run_args(spec, 12), make_tokenizer(codec, 0.32)), 2)

    def ranks(number):
        args = run_args(spec, 12 // number)
        return [TrainLoader(args, make_tokenizer(codec, 0.32), rank=r, world_size=number) for r in range(number)]

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


def test_resuming_on_other_data_is_said_or_refused(tmp_path, codec, caplog):
    path = write_dataset(tmp_path / "a", 5)
    state = TrainLoader(run_args(path), make_tokenizer(codec, 0.32)).state_dict()
    other = TrainLoader(run_args(write_dataset(tmp_path / "b", 4)), make_tokenizer(codec, 0.32))
    other.load_state_dict(state)
    assert "items is [4], was [5]" in caplog.text
    two = TrainLoader(run_args(f"{path},{path}"), make_tokenizer(codec, 0.32))
    with pytest.raises(ValueError, match=r"2 sources.*1"):
        two.load_state_dict(state)


def test_sources_appear_by_their_shares(tmp_path, codec):
    spec = f"{write_dataset(tmp_path, 2, 'often')}:3, {write_dataset(tmp_path, 3, 'seldom')}"
    tokenizer = make_tokenizer(codec, 0.32)
    loader = TrainLoader(run_args(spec, 4), tokenizer)
    for _ in range(5):
        tokenizer.asked.clear()
        next(loader)
        assert sum(stem.startswith("often") for stem, _ in tokenizer.asked) == 3


def test_evaluation_sees_everything_once_in_order_with_equal_batches_on_every_rank(tmp_path, codec):
    args = run_args("", 2, eval_data=write_dataset(tmp_path, 5))
    asked, batches = [], []
    for rank in range(2):
        tokenizer = make_tokenizer(codec, 0.32)
        loader = EvalLoader(args, tokenizer, rank=rank, world_size=2)
        for _ in range(2):  # each iteration starts anew
            batches.append([batch.codes for batch in loader])
        assert len(loader) == len(batches[-1]) == 2
        asked.append([stem for stem, _ in tokenizer.asked])
    assert asked == [2 * ["train0", "train2", "train4"], 2 * ["train1", "train3"]]
    assert {tuple(codes.shape) for rank in batches for codes in rank} == {(2, 1 + N_Q, 4)}
    assert [(codes == -1).flatten(1).all(1).tolist() for codes in batches[2]] == [[False, False], [True, True]]
