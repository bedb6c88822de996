"""What a run says of its fast weights is what a stream would show, and inactive ones are warned of."""

import pytest
import torch

import moshi_patch
from finetune.common.distributed import Context
from finetune.model.adapters import add_adapters
from finetune.training.activity import Activity, InactivityWatch
from moshi_patch.kinds.in_place.ops import naive
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model

ONE = Context(0, 1, 0, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("patched")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delta_clip": 0.4},
        {"decay": 0.7, "target_gain": 2.0},
        {"delta_clip": 0.4, "decay": 0.7},
        {"update": "residual", "decay": 0.7, "target_gain": 2.0},
    ],
    ids=str,
)
def test_the_norm_from_gram_matrices_is_that_of_the_delta(options):
    config = moshi_patch.TTTConfig(chunk_size=5, learning_rate=0.2, **options)
    z, v = torch.randn(2, 23, 11), torch.randn(2, 20, 7)
    _, delta = naive(z[:, :20], v, torch.zeros(7, 11), 5, 0.2, **options)
    norms = moshi_patch.one_pass_delta_norm(z, v, config).tolist()
    assert norms == pytest.approx(delta.flatten(1).norm(dim=1).tolist(), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("lora", "update"), [(False, "hebbian"), (True, "hebbian"), (False, "residual")])
def test_activity_in_one_pass_is_that_of_the_stream(checkpointing, lora, update):
    settings = {**TTT, "ttt_update": update}
    model = randomise_targets(tiny_model(torch.float32, **settings, gradient_checkpointing=checkpointing)).train()
    if lora:
        add_adapters(model, 3, 2.0)
    watched = Activity(model, ONE)
    codes = random_codes(model, 2, 24)
    x = model.text_emb(codes[:, 0]).detach().requires_grad_()
    with watched.measure():
        out = model.transformer(x)
    values = watched.values()
    out.sum().backward()
    assert watched.values() == values  # recomputed layers are not measured again
    with torch.no_grad(), model.streaming(2):
        for step in x.split(1, 1):
            model.transformer(step)
        stats = moshi_patch.ttt_stats(model)
    for name, layer in stats.items():
        prefix = name.replace("transformer.", "ttt/").removesuffix(".gating")
        assert values[f"{prefix}/delta_norm"] == pytest.approx(layer["delta_norm"][0], rel=1e-4)
        assert values[f"{prefix}/relative_delta"] == pytest.approx(layer["relative_delta"][0], rel=1e-4)
        assert values[f"{prefix}/conv_norm"] == pytest.approx(layer["conv_norm"], rel=1e-5)
        assert values[f"{prefix}/W_target_norm"] == pytest.approx(layer["W_target_norm"], rel=1e-5)


def test_inactive_ttt_is_warned_of_once(caplog):
    watch = InactivityWatch()
    quiet, loud = {"ttt/layers.1/relative_delta": 1e-8}, {"ttt/layers.1/relative_delta": 1e-3}
    warned = [step for step in range(1, 301, 10) if watch.observe(step, quiet)]
    assert warned == [101]
    assert "TTT is inactive: for 100 steps" in caplog.text
    assert "Raise ttt.optim_lr" in caplog.text
    assert not watch.observe(310, loud)
    assert [step for step in range(320, 500, 10) if watch.observe(step, quiet)] == [420]
    assert not any(watch.observe(step, {}) for step in range(500, 900))  # no TTT at all
