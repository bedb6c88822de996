"""The losses of a streamed sequence are those of a single forward pass over all of it."""

import contextlib

import pytest
import torch

import moshi_patch
from finetune.model.loss import compute_loss, position_losses
from finetune.model.stream import score_stream, stream_outputs
from tests.support.model_kinds import build, codes_for, conditions
from tests.support.models import TTT, random_codes, relative, tiny_model

CONTEXT = 9
EXACT = {"positional_embedding": "none"}  # moshi computes the rotary embedding in float32
WEIGHTS = {"text_padding_weight": 0.5, "first_codebook_weight_multiplier": 10.0}
LENGTHS = {"within the window": 7, "as long": CONTEXT, "several windows": 61}
SEGMENTS = [1, 2, 5, 8, 17, 60, 100]

pytestmark = pytest.mark.usefixtures("patched")


def single_pass(model, codes, tensors=None):
    """Nats and weights `[B, Q, T]` of one `model(codes)`, zero where a position has no weight."""
    output = model(codes, condition_tensors=tensors)
    special = (model.text_padding_token_id, model.end_of_text_padding_id)
    rows = list(position_losses(output, codes, dep_q=model.dep_q, text_padding_ids=special, **WEIGHTS))
    nats, weights = (torch.stack(parts, 1) for parts in zip(*rows, strict=True))
    return torch.where(weights > 0, nats, 0.0), weights


def control(model, updates):
    return contextlib.nullcontext() if updates else moshi_patch.ttt_updates(model)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("steps", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("updates", [True, False], ids=["updates on", "updates off"])
@torch.no_grad()
def test_segments_equal_a_single_pass(updates, steps, segment):
    model = build("moshi", EXACT | TTT)
    codes = codes_for(model, 3, steps)
    codes[1, :, steps // 2 :] = model.zero_token_id  # a shorter item
    with control(model, updates):
        nats, weights = single_pass(model, codes)
        scores = score_stream(model, codes, segment_steps=segment, **WEIGHTS)
    assert torch.equal(scores.weights, weights)
    assert scores.nats.dtype == torch.float64
    assert relative(scores.nats, nats) < 1e-12
    assert (scores.nats - nats).abs().max() < 1e-12 * nats.max()


@pytest.mark.parametrize("kind", ["hibiki", "tts", "moshi"])
@torch.no_grad()
def test_conditions_and_models_without_ttt_are_scored_alike(kind):
    stock = {} if kind == "moshi" else TTT
    model = build(kind, EXACT | stock, trained=bool(stock))
    codes = codes_for(model, 2, 40)
    if kind == "tts":  # its text vocabulary is smaller than what it hears
        codes[:, 0] = codes[:, 0].clamp(max=4)
    tensors = conditions(model, kind, 2)
    nats, weights = single_pass(model, codes, tensors)
    scores = score_stream(model, codes, condition_tensors=tensors, segment_steps=11, **WEIGHTS)
    assert torch.equal(scores.weights, weights)
    assert relative(scores.nats, nats) < 1e-12


@torch.no_grad()
def test_float32_with_moshis_own_settings_is_within_rounding():
    model = build("moshi", TTT | {"positional_embedding": "rope", "norm": "rms_norm_f32"}, torch.float32)
    codes = codes_for(model, 2, 61)
    nats, _ = single_pass(model, codes)
    assert relative(score_stream(model, codes, segment_steps=17, **WEIGHTS).nats, nats) < 1e-5


@torch.no_grad()
def test_updates_are_seen_in_the_scores_and_the_stream_leaves_nothing_behind():
    model = build("moshi", EXACT | TTT)
    codes = random_codes(model, 1, 61)
    learnt = score_stream(model, codes, segment_steps=17)
    with moshi_patch.ttt_updates(model):
        control = score_stream(model, codes, segment_steps=17)
    first_chunk = slice(0, TTT["ttt_chunk_size"] - max(model.delays))
    assert torch.equal(learnt.nats[..., first_chunk], control.nats[..., first_chunk])
    assert relative(learnt.nats, control.nats) > 1e-3
    assert not model.is_streaming
    assert torch.equal(score_stream(model, codes, segment_steps=17).nats, learnt.nats)


@torch.no_grad()
def test_sums_over_stretches_add_up_to_the_training_loss():
    model = tiny_model(**TTT)
    codes = random_codes(model, 2, 30)
    expected = compute_loss(model(codes), codes, dep_q=model.dep_q, **WEIGHTS)
    scores = score_stream(model, codes, segment_steps=7, **WEIGHTS)
    stretches = [scores.parts(0, 11), scores.parts(11, 12), scores.parts(12)]
    assert torch.allclose(sum(parts.sums for parts in stretches), expected.sums.double(), rtol=1e-6)
    assert torch.equal(sum(parts.counts for parts in stretches), expected.counts.double())


@torch.no_grad()
def test_progress_counts_every_step_once():
    model, done = tiny_model(), []
    score_stream(model, random_codes(model, 1, 50), segment_steps=20, progress=done.append)
    assert sum(done) == 50
    assert len(done) == 3


@torch.no_grad()
def test_a_key_cache_holds_the_window_and_one_segment_and_no_more():
    model, capacities = tiny_model(), []
    for _ in stream_outputs(model, random_codes(model, 1, 60), segment_steps=10):
        states = model.get_streaming_state().values()
        capacities.append({s.kv_cache.capacity for s in states if getattr(s, "kv_cache", None) is not None})
    assert capacities == [{10}] + [{CONTEXT - 1 + 10}] * 5


@pytest.mark.parametrize(
    ("overrides", "shape", "segment", "named"),
    [
        ({"context": None}, (1, 5, 4), 8, "context=None"),
        ({}, (1, 4, 4), 8, r"\[1, 4, 4\]"),
        ({}, (1, 5, 0), 8, r"\[1, 5, 0\]"),
        ({}, (1, 5, 4), 0, "segment_steps=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_scored_is_refused(overrides, shape, segment, named):
    with pytest.raises(ValueError, match=named):
        score_stream(tiny_model(**overrides), torch.zeros(shape, dtype=torch.int64), segment_steps=segment)
