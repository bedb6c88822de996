"""Shared by the tests of many rows: a codec and a model in this process, people who speak, and stock's loop for one."""

from dataclasses import dataclass, field

import numpy as np
import torch
from moshi.models import LMGen
from torch import nn

import moshi_patch
from moshi_patch.memory import copy_memory, restore_memory
from moshi_patch.serving.engine.rows import Answer, Rows
from moshi_patch.serving.engine.sampler import Sampling
from tests.support.servers import FRAME, user_speech

GREEDY = Sampling(temperature=0, temperature_text=0)


def load(repo, dtype: torch.dtype):
    """The codec and the language model of a repository."""
    info = moshi_patch.load_checkpoint_info(repo)
    return info.get_mimi(device="cpu").to(dtype), info.get_moshi(device="cpu", dtype=dtype)


def make_rows(repo, count: int, dtype: torch.dtype = torch.float32) -> Rows:
    return Rows(*load(repo, dtype), count)


def frames(name: str = "boat", begin: int = 0, end: int = 40) -> list[np.ndarray]:
    """What a person says, step by step."""
    return list(user_speech(name, end).reshape(-1, FRAME)[begin:])


@dataclass(eq=False)
class Person:
    """Somebody who talks in a row of their own.

    Attributes:
        says: frames, one a step from `comes` on, but for the steps in `pauses`; leaves afterwards if `leaves`.
        row: where.
        memory: what they go on with.
        hears: the answers, one per frame.
    """

    says: list[np.ndarray]
    row: int = 0
    sampling: Sampling = GREEDY
    comes: int = 0
    pauses: frozenset[int] = frozenset()
    leaves: bool = True
    memory: dict[str, torch.Tensor] | None = None
    hears: list[Answer] = field(default_factory=list)


def converse(rows: Rows, *people: Person, around=lambda step: None) -> None:
    """Lets everybody say all they have, at the same time. `around(step)` is called before each step."""
    left = {id(person): list(person.says) for person in people}
    present: list[Person] = []
    step = 0
    while any(left.values()):
        around(step)
        for person in [person for person in present if not left[id(person)] and person.leaves]:
            rows.leave(person.row)
            present.remove(person)
        for person in people:
            if person.comes == step:
                rows.join(person.row, person.sampling, person.memory)
                present.append(person)
        speaking = [person for person in present if left[id(person)] and step not in person.pauses]
        answers = rows.step({person.row: left[id(person)].pop(0) for person in speaking})
        assert answers.keys() == {person.row for person in speaking}
        for person in speaking:
            person.hears.append(answers[person.row])
        step += 1
    for person in present:
        if person.leaves:
            rows.leave(person.row)


def assert_same(one: list[Answer], other: list[Answer]) -> None:
    """The same answers, bit for bit."""
    assert [(answer.finite, answer.text) for answer in one] == [(answer.finite, answer.text) for answer in other]
    for mine, yours in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine.pcm, yours.pcm)


@torch.no_grad()
def stock_answers(repo, says: list[np.ndarray], dtype: torch.dtype, then: list[np.ndarray] = ()) -> list[Answer]:
    """What moshi's own server would answer to one person, who goes on to say `then` in a second conversation."""
    mimi, lm = load(repo, dtype)
    lm_gen = LMGen(lm, use_sampling=False)
    mimi.streaming_forever(1)
    lm_gen.streaming_forever(1)
    answers = []
    for conversation in (says, then):
        memory = copy_memory(lm, [0]) if moshi_patch.ttt_gatings(lm) else {}
        mimi.reset_streaming()
        lm_gen.reset_streaming()
        if memory:
            restore_memory(lm, memory)
        for index, frame in enumerate(conversation):
            codes = mimi.encode(torch.from_numpy(frame)[None, None].to(dtype))
            if index == 0:
                mimi.reset_streaming()
            tokens = lm_gen.step(codes)
            pcm = None if tokens is None else mimi.decode(tokens[:, 1:])[0, 0].float().numpy()
            answers.append(Answer(True, None if tokens is None else tokens[0, 0, 0].item(), pcm))
    return answers


def row_of_states(rows: Rows, row: int) -> dict[str, torch.Tensor]:
    """Copies of all that the streaming states of codec and model hold of one row, by name."""
    found = {}

    def collect(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor) and value.dim():
            along = 1 if name.endswith(".cache") and value.dim() == 5 else 0  # keys and values come first
            found[name] = value.select(along, row).clone()
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module) and not callable(value):
            for key, inner in vars(value).items():
                if key not in ("initial", "device") and not key.startswith("_"):
                    collect(f"{name}.{key}", inner)

    for prefix, module in (("mimi", rows.mimi), ("lm_gen", rows.lm_gen), ("lm", rows.lm_gen.lm_model)):
        for name, state in module.get_streaming_state().items():
            collect(f"{prefix}.{name}", state)
    return found
