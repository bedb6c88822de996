"""What a memory loses when it is kept: nothing in float32, and something that can be measured in bfloat16."""

import dataclasses

import pytest
import torch

from benchmarks.evidence import kept
from benchmarks.evidence.model import start
from moshi_patch.memory import copy_memory
from tests.support.memories import assert_same

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(kept, "ROWS", 2)
    monkeypatch.setattr(kept, "GAP", 8)
    model = start(dataclasses.replace(kept.RECALL, width=16))
    for name, parameter in model.named_parameters():
        if "target_generator" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def test_a_visit_in_float32_changes_nothing_and_one_in_bfloat16_rounds_the_deltas(model):
    owner = kept.moshi_patch.fingerprint(model)
    codes = torch.randint(44, (2, 2, 40))
    with model.streaming(2):
        for t in range(40):
            model.forward_text(codes[:, :, t : t + 1])
        before = copy_memory(model, range(2))
        kept.keep(model, False, owner)
        assert_same(copy_memory(model, range(2)), before)
        kept.keep(model, True, owner)
        after = copy_memory(model, range(2))
    for key, tensor in before.items():
        rounded = tensor.bfloat16().float() if key.endswith(".delta") else tensor
        assert torch.equal(after[key], rounded)
        assert key.endswith(".delta") != torch.equal(after[key], tensor)


def test_what_is_asked_after_the_visits_depends_on_what_was_kept(model):
    nats = {name: kept.recall(model, kept.RECALL, [kept.PART + kept.GAP], name) for name in ("float32", "nothing")}
    assert nats["float32"] != nats["nothing"]
    assert all(0 < value < 20 for value in nats.values())
    with pytest.raises(SystemExit):
        kept.main(["--seeds", "many"])
