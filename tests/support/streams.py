"""Small models with TTT in each of its settings, and their streams, for the tests of streaming."""

import torch

import moshi_patch
from moshi_patch.call import LayerCall, current_call
from tests.support.models import randomise_targets, tiny_model, ttt_settings

B, T = 3, 33
SETTINGS = {
    "plain": {},
    "C=1": {"ttt_chunk_size": 1},
    "C>D": {"ttt_chunk_size": 20},
    "K=1": {"ttt_conv_kernel_size": 1},
    "K=5": {"ttt_conv_kernel_size": 5},
    "K>2C": {"ttt_conv_kernel_size": 5, "ttt_chunk_size": 2},
    "full conv": {"ttt_conv_depthwise": False},
    "hidden_states": {"ttt_target": "hidden_states"},
    "clip and decay": {"ttt_delta_clip": 0.5, "ttt_decay": 0.8},
    "every layer": {"ttt_layers": "all"},
    "gain": {"ttt_target_gain": 3.0},
    "residual": {"ttt_update": "residual"},
    "residual, C=1": {"ttt_update": "residual", "ttt_chunk_size": 1},
    "residual, C>D, decay, gain": {
        "ttt_update": "residual",
        "ttt_chunk_size": 20,
        "ttt_decay": 0.8,
        "ttt_target_gain": 3.0,
    },
    "residual, K=5, decay, gain": {
        "ttt_update": "residual",
        "ttt_conv_kernel_size": 5,
        "ttt_decay": 0.8,
        "ttt_target_gain": 3.0,
    },
    "residual, K>2C": {"ttt_update": "residual", "ttt_conv_kernel_size": 5, "ttt_chunk_size": 2},
    "residual, full conv, hidden_states": {
        "ttt_update": "residual",
        "ttt_conv_depthwise": False,
        "ttt_target": "hidden_states",
    },
    "mlp": {"ttt_kind": "mlp"},
    "mlp, C=1": {"ttt_kind": "mlp", "ttt_mini_batch_size": 1},
    "mlp, C>T": {"ttt_kind": "mlp", "ttt_mini_batch_size": 64},
    "mlp, C=16, low rate, every layer": {
        "ttt_kind": "mlp",
        "ttt_mini_batch_size": 16,
        "ttt_base_lr": 1.0,
        "ttt_layers": "all",
    },
}
IN_PLACE = [name for name, settings in SETTINGS.items() if "ttt_kind" not in settings]


def ttt_model(dtype=torch.float64, **settings):
    return randomise_targets(tiny_model(dtype, **{"positional_embedding": "none", **ttt_settings(**settings)}))


def update_steps(model) -> int:
    """The steps of an update, which are the same in all layers."""
    return next(iter(moshi_patch.ttt_memories(model).values())).update_steps


@torch.no_grad()
def one_pass(model, codes):
    return model.forward_text(codes)[0]


@torch.no_grad()
def steps(model, codes):
    """`[B, T, D]`: the model's outputs, one step at a time, in the streaming state it is in."""
    return torch.cat([model.forward_text(codes[:, :, t : t + 1])[0] for t in range(codes.shape[2])], 1)


@torch.no_grad()
def call_memory(memory, x, x0):
    """The memory's output as its layer would ask for it."""
    token = current_call.set(LayerCall(x0, frozenset()))
    try:
        return memory(x)
    finally:
        current_call.reset(token)
