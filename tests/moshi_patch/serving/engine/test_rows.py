"""Rows over one model: exact, bitwise independent of each other, and nothing of the person before."""

import dataclasses
import random
import threading

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import moshi_patch
from moshi_patch.serving.engine.rows import Rows
from moshi_patch.serving.engine.sampler import Sampling
from tests.support.rows import (
    GREEDY,
    Person,
    assert_same,
    converse,
    frames,
    load,
    make_rows,
    row_of_states,
    stock_answers,
)
from tests.support.servers import FRAME

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]
SAMPLED = Sampling(seed=7, temperature=0.9)


@pytest.mark.parametrize("repo", ["ttt_repo", "mlp_repo"])
def test_rows_that_join_stall_and_leave_each_say_what_stocks_loop_says_to_one_person(repo, request):
    """In float64, where the order of sums does not flip a code."""
    ttt_repo = request.getfixturevalue(repo)
    rng = random.Random(0)
    early = Person(frames("boat", end=30), row=2, pauses=frozenset(rng.sample(range(45), 12)))
    late = Person(frames("sister", end=20), row=0, comes=7, pauses=frozenset(rng.sample(range(30), 6)))
    next_in_the_same_row = Person(frames("train", end=10), row=0, comes=36)
    rows = make_rows(ttt_repo, 3, torch.float64)
    converse(rows, early, late, next_in_the_same_row)
    for person in (early, late, next_in_the_same_row):
        expected = stock_answers(ttt_repo, person.says, torch.float64)
        assert [answer.text for answer in person.hears] == [answer.text for answer in expected]
        for mine, stock in zip(person.hears, expected, strict=True):
            assert mine.finite
            if stock.pcm is None:
                assert mine.pcm is None
            else:
                np.testing.assert_allclose(mine.pcm, stock.pcm, rtol=0, atol=1e-6)
    assert np.abs(np.concatenate([answer.pcm for answer in early.hears if answer.pcm is not None])).max() > 0.01


@pytest.fixture(scope="module")
def alone(ttt_repo):
    """What a person hears in row 1 of 4 when nobody else is there, greedy and sampled."""
    moshi_patch.install()
    heard = {}
    for sampling in (GREEDY, SAMPLED):
        person = Person(frames(end=36), row=1, sampling=sampling)
        converse(make_rows(ttt_repo, 4), person)
        heard[sampling] = person.hears
    moshi_patch.uninstall()
    return heard


def poison(rows: Rows, row: int) -> None:
    """Makes a row's fast weights not finite, and with its next step all else of it."""
    gating = next(iter(moshi_patch.ttt_gatings(rows.lm_gen.lm_model).values()))
    gating._streaming_state.fast.delta[row] = torch.nan


def others(rng: random.Random) -> list[Person]:
    """Three who come, stall and leave as they like, with settings of their own; one row changes hands."""
    return [
        Person(frames("sister"), 0, Sampling(seed=1), comes=2, pauses=frozenset(rng.sample(range(60), 20))),
        Person(frames("train"), 2, Sampling(seed=2, temperature=2.0, top_k=5), comes=5),
        Person(frames("boat", end=8), 3, GREEDY, comes=0, pauses=frozenset(rng.sample(range(20), 5))),
        Person(frames("train", end=9), 3, Sampling(seed=3), comes=22),
    ]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", ["others", "others_not_finite", "another_row", "pauses"])
def test_what_a_person_hears_is_bitwise_the_same_whatever_the_other_rows_do(ttt_repo, alone, sampling, case):
    rows, person = make_rows(ttt_repo, 4), Person(frames(end=36), row=1, sampling=sampling)
    company, around = [], lambda step: None
    if case.startswith("others"):
        company = others(random.Random(1))
    if case == "others_not_finite":

        def around(step):
            if step == 12:
                poison(rows, 0)
                poison(rows, 2)

    if case == "another_row":
        person.row = 3
        company = [dataclasses.replace(one, row=one.row % 3) for one in others(random.Random(2))[:2]]
    if case == "pauses":
        person.pauses, person.comes = frozenset({3, 4, 5, 11, 30}), 2
        company = others(random.Random(3))[1:3]
    converse(rows, person, *company, around=around)
    assert_same(person.hears, alone[sampling])
    if case == "others_not_finite":
        assert not company[0].hears[-1].finite
        assert not company[1].hears[-1].finite
        assert all(answer.finite for one in company[2:] for answer in one.hears)


def test_with_an_mlp_too_what_a_person_hears_and_leaves_behind_is_their_own(mlp_repo):
    rows, alone = make_rows(mlp_repo, 4), Person(frames(end=36), row=1, sampling=SAMPLED)
    fresh = row_of_states(rows, 1)
    converse(rows, alone)
    changed = row_of_states(rows, 1)
    assert any("ttt.fast.delta1" in name and not torch.equal(fresh[name], changed[name]) for name in fresh)
    rows.forget()
    for name, tensor in row_of_states(rows, 1).items():
        assert torch.equal(tensor, fresh[name]), name
    rows, person = make_rows(mlp_repo, 4), Person(frames(end=36), row=1, sampling=SAMPLED)
    company = others(random.Random(1))

    def around(step):
        if step == 12:
            memory = next(iter(moshi_patch.ttt_memories(rows.lm_gen.lm_model).values()))
            memory._streaming_state.fast.delta1[0] = torch.nan

    converse(rows, person, *company, around=around)
    assert_same(person.hears, alone.hears)
    assert not company[0].hears[-1].finite


def test_the_seed_alone_decides_what_is_drawn(ttt_repo, alone):
    same, other = Person(frames(end=36), 0, SAMPLED), Person(frames(end=36), 2, Sampling(seed=8, temperature=0.9))
    converse(make_rows(ttt_repo, 4), same, other)
    assert_same(same.hears, alone[SAMPLED])
    assert [answer.text for answer in other.hears] != [answer.text for answer in same.hears]


def test_when_a_row_changes_hands_everything_of_the_person_before_is_gone(ttt_repo, alone):
    rows = make_rows(ttt_repo, 4)
    fresh = row_of_states(rows, 1)
    assert len(fresh) > 40
    assert {"lm_gen..cache", "lm.transformer.layers.1.gating.fast.delta"} <= fresh.keys()
    before = Person(frames("sister"), 1, Sampling(seed=5))
    converse(rows, before)
    changed = row_of_states(rows, 1)
    assert [name for name in fresh if not torch.equal(fresh[name], changed[name])]
    rows.forget()
    for name, tensor in row_of_states(rows, 1).items():
        assert torch.equal(tensor, fresh[name]), name
    after = Person(frames(end=36), 1, GREEDY)
    converse(rows, after)
    assert_same(after.hears, alone[GREEDY])


def test_somebody_who_returns_to_another_row_goes_on_with_their_memory_and_an_empty_window(ttt_repo):
    """As stock's loop for one person does whose attention alone is reset."""
    first, second = frames("boat", end=22), frames("sister", end=12)
    rows = make_rows(ttt_repo, 3, torch.float64)
    visit = Person(first, 2, leaves=False)
    converse(rows, visit, Person(frames("train", end=22), 0, comes=3))
    memory = rows.copy_memory(2)
    rows.leave(2)
    converse(rows, Person(frames("train", end=5), 2))  # somebody else had the row meanwhile
    again = Person(second, 1, memory=memory)
    converse(rows, again, Person(frames("train", end=12), 2, comes=2))

    expected = stock_answers(ttt_repo, first, torch.float64, then=second)
    assert [answer.text for answer in visit.hears + again.hears] == [answer.text for answer in expected]
    fresh = Person(second, 0)
    converse(rows, fresh)
    heard = [np.concatenate([answer.pcm for answer in one.hears[4:]]) for one in (again, fresh)]
    assert not np.array_equal(*heard)  # the memory matters


def test_a_memory_that_does_not_fit_is_refused_when_its_person_joins(ttt_repo, stock_repo):
    rows, stock = make_rows(ttt_repo, 2), make_rows(stock_repo, 1)
    with pytest.raises(ValueError, match="row=0: nobody has it"):
        rows.copy_memory(0)
    rows.join(0, GREEDY)
    memory = rows.copy_memory(0)
    two_rows = {key: torch.cat([tensor, tensor]) for key, tensor in memory.items()}
    with pytest.raises(ValueError, match=r"delta is float32\[2, 64, 176\] in the memory and"):
        rows.join(1, GREEDY, two_rows)
    assert rows.free == [1]
    with pytest.raises(ValueError, match="LMModel has no TTT layer"):
        stock.join(0, GREEDY, memory)
    rows.join(1, GREEDY, memory)
    rows.leave(1)
    rows.forget()  # who joined and left before a step had no use for their memory
    assert rows.step({}) == {}


def test_a_memory_given_layer_by_layer_between_steps_is_the_one_that_joins_at_once(ttt_repo):
    rows = make_rows(ttt_repo, 2)
    visit = Person(frames("boat", end=22), 0, leaves=False)
    converse(rows, visit)
    memory = rows.copy_memory(0)
    rows.leave(0)
    at_once = Person(frames("sister", end=12), 1, memory=memory)
    converse(rows, at_once)

    rows.join(1, GREEDY)
    layers = rows.give_memory(1, memory)
    rows.join(0, GREEDY)
    given = []
    for frame, layer in zip(frames("train", end=5), layers, strict=False):
        given.append(layer)
        rows.step({0: frame})
    assert given == ["transformer.layers.1.gating", "transformer.layers.3.gating"]
    assert_same([rows.step({1: frame})[1] for frame in frames("sister", end=12)], at_once.hears)
    rows.leave(1)
    with pytest.raises(ValueError, match="row=1: nobody has it"):
        rows.give_memory(1, memory)
    with pytest.raises(ValueError, match="row=1: nobody has it"):
        rows.set_updates(1, False)


def test_a_row_that_is_not_finite_says_so_and_is_well_again_for_the_next_person(ttt_repo, alone):
    rows = make_rows(ttt_repo, 4)
    ill = Person(frames("sister", end=30), 1, GREEDY)
    converse(rows, ill, around=lambda step: poison(rows, 1) if step == 20 else None)
    assert [answer.finite for answer in ill.hears] == [True] * 20 + [False] * 10
    well = Person(frames(end=36), 1, GREEDY)
    converse(rows, well)
    assert_same(well.hears, alone[GREEDY])


def test_a_model_without_ttt_is_served_in_rows_too(stock_repo):
    person = Person(frames(end=20), 1)
    converse(make_rows(stock_repo, 2, torch.float64), person)
    expected = stock_answers(stock_repo, person.says, torch.float64)
    assert [answer.text for answer in person.hears] == [answer.text for answer in expected]
    assert all(answer.finite for answer in person.hears)


def test_a_thread_of_its_own_keeps_no_gradients(ttt_repo):
    """The switch for gradients is a thread's own: a graph kept from step to step would fill the memory."""
    rows = make_rows(ttt_repo, 2)
    thread = threading.Thread(target=converse, args=(rows, Person(frames(end=6), 1, leaves=False)))
    thread.start()
    thread.join()
    states = row_of_states(rows, 1)
    assert not any(tensor.requires_grad for tensor in states.values())


def test_rows_are_given_once_and_frames_are_those_of_a_step(ttt_repo):
    rows = make_rows(ttt_repo, 2)
    assert rows.free == [0, 1]
    rows.join(0, GREEDY)
    assert rows.free == [1]
    with pytest.raises(ValueError, match=r"row=0: somebody has it; free are \[1\]"):
        rows.join(0, GREEDY)
    frame = np.zeros(FRAME, np.float32)
    state = row_of_states(rows, 0)
    for bad, reason in (
        ({1: frame}, "row=1: nobody has it"),
        ({2: frame}, "row=2: nobody has it"),
        ({-1: frame}, "row=-1: nobody has it"),
        ({0: frame[:-1]}, r"row=0: a frame is of 1920 samples, not of shape \(1919,\)"),
        ({0: frame[None]}, r"row=0: a frame is of 1920 samples, not of shape \(1, 1920\)"),
    ):
        with pytest.raises(ValueError, match=reason):
            rows.step(bad)
    assert all(torch.equal(tensor, state[name]) for name, tensor in row_of_states(rows, 0).items())
    assert rows.step({}) == {}
    rows.leave(0)
    with pytest.raises(ValueError, match="row=0: nobody has it"):
        rows.leave(0)
    for count in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"count={count!r}: must be a positive whole number of rows"):
            Rows(*load(ttt_repo, torch.float32), count)


class Fetches(TorchFunctionMode):
    """Writes down what makes the host wait for the device, if there is one."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("cpu", "item", "tolist", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_fetches_what_it_made_with_one_copy(ttt_repo):
    rows = make_rows(ttt_repo, 2)
    for row in range(rows.count):
        rows.join(row, Sampling(seed=row))
    seen = []
    for frame in frames(end=30):
        with Fetches() as fetches:
            rows.step({0: frame, 1: frame})
        seen.append(fetches.seen)
    assert seen[2:] == [["cpu"]] * 28  # before that, rows begin
