"""Shared by the tests of model kinds: scaled-down configurations of every kind of Kyutai model."""

import copy

import pytest
import torch
from moshi.conditioners import ConditionAttributes, TensorCondition, dropout_all_conditions
from moshi.models import LMModel, loaders

import moshi_patch
from tests.support.models import TINY, random_codes, randomise_targets

STEPS = 23
"""Four full chunks of 5 and a ragged one; more than twice the context of 9."""


def lut(*values: str) -> dict:
    return {"type": "lut", "lut": {"n_bins": 8, "dim": 6, "tokenizer": "noop", "possible_values": list(values)}}


HIBIKI = {
    "conditioners": {
        "description": lut("very_bad", "bad", "good"),
        "speaker": {"type": "tensor", "tensor": {"dim": 7}},
    },
    "fuser": {"sum": ["description"], "cross": ["speaker"], "prepend": [], "cross_attention_pos_emb": True},
    "cross_attention": True,
    "dep_q": 4,
    "depformer_weights_per_step_schedule": [0, 1, 1, 2],
}
STT = {"dep_q": 0, "extra_heads_num_heads": 2, "extra_heads_dim": 6, "delays": [0] * 5, "kv_repeat": 2, "num_heads": 4}
TTS = {
    "conditioners": {
        "speaker_wavs": {"type": "tensor", "tensor": {"dim": 7}},
        "control": lut("ok"),
        "cfg": lut("1.0", "2.0", "4.0"),
    },
    "fuser": {"sum": ["control", "cfg"], "cross": ["speaker_wavs"], "prepend": [], "cross_attention_pos_emb": True},
    "cross_attention": True,
    "dep_q": 4,
    "delays": [0, 0, 2, 2, 2],
    "text_card_out": 5,
    "demux_second_stream": True,
    "depformer_weights_per_step_schedule": [0, 1, 2, 2],
    "depformer_low_rank_embeddings": 4,
    "depformer_norm": "layer_norm",
}
KINDS = {"moshi": {}, "hibiki": HIBIKI, "stt": STT, "tts": TTS}
"""What each kind's published `config.json` has that Moshi's has not."""

PRECISIONS = {
    # Nothing in float32 on the way: only the order of sums differs.
    "float64": ({"positional_embedding": "none"}, torch.float64, 1e-12),
    # As published. moshi computes the rotary embedding and this norm in float32.
    "as_published": ({"positional_embedding": "rope", "norm": "rms_norm_f32"}, torch.float32, 1e-4),
}

kinds = pytest.mark.parametrize("kind", KINDS)
precisions = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())


def build(kind: str, overrides: dict, dtype: torch.dtype = torch.float64, trained: bool = True) -> LMModel:
    """Through the loader, which also makes the conditioners. Same stock weights with and without TTT."""
    torch.manual_seed(0)
    lm_kwargs = copy.deepcopy({**TINY, "positional_embedding": "none", **KINDS[kind]})  # the loader writes into it
    model = loaders.get_moshi_lm(None, lm_kwargs, dtype=dtype, lm_kwargs_overrides=overrides)
    return randomise_targets(model) if trained else model


def attributes(kind: str, rows: int) -> list[ConditionAttributes]:
    """Conditions that differ from row to row, the speaker's in length too."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for row in range(rows):
        voice = TensorCondition.from_tensor(torch.randn(1, 3 + row, 7, generator=generator))
        if kind == "hibiki":
            text = {"description": ("bad", "good", "very_bad")[row % 3]}
            made.append(ConditionAttributes(text, {"speaker": voice}))
        else:
            text = {"control": "ok", "cfg": ("2.0", "4.0", "1.0")[row % 3]}
            made.append(ConditionAttributes(text, {"speaker_wavs": voice}))
    return made


@torch.no_grad()
def conditions(model: LMModel, kind: str, rows: int, guided: bool = False) -> dict | None:
    """Condition tensors for `rows` rows; `guided` adds as many with nothing in them, for classifier-free guidance."""
    if model.condition_provider is None:
        return None
    given = attributes(kind, rows)
    return model.condition_provider.prepare_and_provide(given + dropout_all_conditions(given) if guided else given)


def fused(model: LMModel, tensors: dict | None) -> tuple:
    """The arguments of `forward_text` that carry the conditions, as `LMModel.forward` makes them."""
    return (None, None) if tensors is None else (model.fuser.get_sum(tensors), model.fuser.get_cross(tensors))


def codes_for(model: LMModel, rows: int, steps: int = STEPS) -> torch.Tensor:
    """Codes with zero tokens among them and, where two text streams are one, both streams in use."""
    codes = random_codes(model, rows, steps)
    generator = torch.Generator().manual_seed(6)
    if model.text_emb.demux_second_stream:
        codes[:, 0] += (model.text_card + 1) * torch.randint(0, 4, (rows, steps), generator=generator)
    return codes.masked_fill(torch.rand(codes.shape, generator=generator) < 0.1, model.zero_token_id)


@torch.no_grad()
def streamed(model: LMModel, codes: torch.Tensor, where: tuple) -> tuple[torch.Tensor, dict]:
    """Text logits `[B, 1, T, card]` of one step at a time, and the TTT statistics at the end."""
    with model.streaming(len(codes)):
        out = torch.cat([model.forward_text(c, *where)[1] for c in codes.split(1, 2)], 2)
        return out, moshi_patch.ttt_stats(model)
