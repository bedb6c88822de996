"""What docs/training.md advises against explosion and lack of memory holds, and what it says of other advice."""

import pytest
import torch

from finetune.common.distributed import Context
from finetune.training.activity import Activity
from moshi_patch import TTTConfig
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model

pytestmark = pytest.mark.usefixtures("patched")

ONE = Context(0, 1, 0, torch.device("cpu"))
SMALL = {**TTT, "context": 200, "dim": 32}


def kept(batch: int = 4, steps: int = 160, **changes) -> int:
    """Bytes of what a forward pass keeps for the backward pass, parameters aside."""
    model = randomise_targets(tiny_model(torch.float32, **SMALL | {"ttt_chunk_size": 16} | changes)).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(random_codes(model, batch, steps)).text_logits.logsumexp(-1).mean()
    assert loss.requires_grad
    return sum(held.values())


def test_what_is_kept_for_the_backward_pass_shrinks_with_batch_length_and_recomputation():
    usual = kept()
    assert kept(batch=2) < 0.55 * usual
    assert kept(steps=80) < 0.55 * usual
    assert kept(gradient_checkpointing=True) < 0.3 * usual


def test_a_smaller_chunk_needs_no_less_memory_and_a_lower_frequency_needs_more():
    assert kept(ttt_chunk_size=8) > 0.98 * kept(ttt_chunk_size=16) > 0.95 * kept(ttt_chunk_size=64)
    start = {"ttt_layers": None, "ttt_start_layer": 0}
    assert kept(**start, ttt_layer_frequency=1) > 1.02 * kept(**start, ttt_layer_frequency=4)


def relative(**changes) -> float:
    """The largest relative delta after one sequence."""
    model = randomise_targets(tiny_model(torch.float32, **SMALL | changes)).train()
    watched = Activity(model, ONE)
    with watched.measure():
        model(random_codes(model, 2, 160))
    return max(value for name, value in watched.values().items() if name.endswith("relative_delta"))


def test_a_memory_shrinks_with_its_rate_and_not_with_the_chunk():
    usual = relative(ttt_chunk_size=16)
    assert relative(ttt_chunk_size=16, ttt_learning_rate=TTT["ttt_learning_rate"] / 10) < 0.2 * usual
    assert relative(ttt_chunk_size=8) > 0.8 * usual
    assert relative(ttt_chunk_size=16, ttt_update="residual") < 0.5 * usual


def test_the_plans_layers_are_these():
    assert TTTConfig(layer_frequency=32).layer_indices(32) == [5]
    assert TTTConfig(layer_frequency=6, start_layer=29).layer_indices(32) == [29]
    assert len(TTTConfig(layer_frequency=3).layer_indices(32)) > len(TTTConfig().layer_indices(32))
