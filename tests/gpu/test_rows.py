"""On a GPU: rows over captured graphs say what they say without graphs, and sampling waits for nothing."""

import pytest
import torch
from moshi.utils.compile import no_cuda_graph

import moshi_patch
from moshi_patch.serving.engine.rows import Rows
from moshi_patch.serving.engine.sampler import MAX_CANDIDATES, Sampling, place_bits, sample
from tests.support.rows import GREEDY, Person, assert_same, converse, frames

pytestmark = pytest.mark.usefixtures("patched")


def talk(repo) -> list[Person]:
    info = moshi_patch.load_checkpoint_info(repo)
    rows = Rows(info.get_mimi(device="cuda"), info.get_moshi(device="cuda", dtype=torch.float32), 3)
    people = [
        Person(frames(end=30), 0, GREEDY, pauses=frozenset({4, 5, 20})),
        Person(frames("sister", end=12), 2, Sampling(seed=4), comes=3),
        Person(frames("train", end=14), 2, Sampling(seed=5, temperature=1.5), comes=18),
    ]
    converse(rows, *people)
    return people


def test_replayed_graphs_answer_every_row_as_the_plain_functions_do(ttt_repo):
    replayed = talk(ttt_repo)
    with no_cuda_graph():
        plain = talk(ttt_repo)
    for one, other in zip(replayed, plain, strict=True):
        assert_same(one.hears, other.hears)


def test_a_draw_does_not_wait_for_the_device_and_can_be_captured():
    logits = torch.randn(4, 2048, device="cuda")
    seed, position = torch.arange(4, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
    codebooks = torch.arange(9, device="cuda")
    temperature, top_k = torch.full((4,), 0.8, device="cuda").double(), torch.full((4,), 250, device="cuda")

    def draw() -> torch.Tensor:
        return sample(logits, place_bits(seed, position, codebooks)[:, 1], temperature, top_k, MAX_CANDIDATES)

    torch.cuda.set_sync_debug_mode("error")
    try:
        draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw()
    for step in range(20):
        position.fill_(step)
        graph.replay()
        assert torch.equal(drawn, draw())
