"""The loss against one written with loops, and its gradient where logits are NaN."""

import math

import pytest
import torch
from moshi.models.lm import LMOutput

from finetune.model.loss import LossParts, compute_loss, perplexity
from tests.support.models import random_codes, tiny_model

BATCH, DEP_Q, STEPS, CARD, TEXT_CARD = 2, 3, 7, 11, 13
SETTINGS = {"dep_q": DEP_Q, "text_padding_weight": 0.5, "first_codebook_weight_multiplier": 100.0}


def example(seed: int = 0) -> tuple[LMOutput, torch.Tensor]:
    """Random logits and codes, some of them masked, with NaN as the logits there."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CARD, (BATCH, 1 + 2 * DEP_Q, STEPS), generator=generator)
    codes[0, 0, :4] = torch.tensor([3, 0, 3, 5])
    codes[1, :, 5:] = -1
    mask, text_mask = codes[:, 1 : 1 + DEP_Q] != -1, codes[:, :1] != -1
    mask[:, 1:, -1] = False  # as by the delays
    logits = torch.randn(BATCH, DEP_Q, STEPS, CARD, generator=generator)
    text_logits = torch.randn(BATCH, 1, STEPS, TEXT_CARD, generator=generator)
    logits[~mask] = math.nan
    text_logits[~text_mask] = math.nan
    return LMOutput(logits.requires_grad_(), mask, text_logits.requires_grad_(), text_mask), codes


def naive(output: LMOutput, codes: torch.Tensor) -> tuple[float, float, list[float]]:
    """Text loss, audio loss, and the mean of each row, one position at a time."""
    rows = []
    for row in range(1 + DEP_Q):
        logits, mask = (output.logits[:, row - 1], output.mask[:, row - 1]) if row else (output.text_logits[:, 0], None)
        mask = output.text_mask[:, 0] if mask is None else mask
        total = weights = 0.0
        for b in range(BATCH):
            for t in range(STEPS):
                if mask[b, t]:
                    target = codes[b, row, t].item()
                    weight = 100.0 if row == 1 else 0.5 if row == 0 and target in (0, 3) else 1.0
                    total -= weight * logits[b, t].double().log_softmax(-1)[target].item()
                    weights += weight
        rows.append((total, weights))
    audio = sum(total for total, _ in rows[1:]) / sum(weights for _, weights in rows[1:])
    return rows[0][0] / rows[0][1], audio, [total / weights for total, weights in rows]


def test_loss_equals_the_loops():
    output, codes = example()
    parts = compute_loss(output, codes, **SETTINGS)
    text, audio, rows = naive(output, codes)
    assert parts.text.item() == pytest.approx(text, rel=1e-5)
    assert parts.audio.item() == pytest.approx(audio, rel=1e-5)
    assert parts.loss.item() == pytest.approx(text + audio, rel=1e-5)
    assert (parts.sums / parts.counts).tolist() == pytest.approx(rows, rel=1e-5)
    assert perplexity(parts.text).item() == pytest.approx(math.exp(text), rel=1e-5)


def test_masked_positions_have_no_gradient_and_poison_none():
    output, codes = example()
    compute_loss(output, codes, **SETTINGS).loss.backward()
    for logits, mask in ((output.logits, output.mask), (output.text_logits, output.text_mask)):
        assert logits.grad.isfinite().all()
        assert (logits.grad[~mask] == 0).all()
        assert (logits.grad[mask] != 0).any(-1).all()


def test_parts_of_two_batches_add_up_to_those_of_both_together():
    output, codes = example()
    together = compute_loss(output, codes, **SETTINGS)
    halves = []
    for b in range(BATCH):
        fields = (output.logits, output.mask, output.text_logits, output.text_mask)
        halves.append(compute_loss(LMOutput(*(field[b : b + 1] for field in fields)), codes[b : b + 1], **SETTINGS))
    total = LossParts(*(sum(getattr(half, name) for half in halves) for name in ("sums", "counts")))
    torch.testing.assert_close(total.sums, together.sums, rtol=1e-5, atol=0)
    torch.testing.assert_close(total.loss, together.loss, rtol=1e-5, atol=0)
    shares = sum(half.normalised_by(total.counts) for half in halves)
    torch.testing.assert_close(shares, together.loss, rtol=1e-5, atol=0)


def test_a_batch_without_any_position_costs_nothing():
    output, codes = example()
    output.mask[:] = False
    output.text_mask[:] = False
    parts = compute_loss(output, torch.full_like(codes, -1), **SETTINGS)
    parts.loss.backward()
    assert parts.loss.item() == 0
    assert (output.logits.grad == 0).all()
    assert (output.text_logits.grad == 0).all()


def test_low_precision_logits_are_summed_in_float32():
    output, codes = example()
    low = LMOutput(output.logits.bfloat16(), output.mask, output.text_logits.bfloat16(), output.text_mask)
    parts = compute_loss(low, codes, **SETTINGS)
    assert parts.sums.dtype == parts.counts.dtype == torch.float32
    rounded = LMOutput(low.logits.float(), output.mask, low.text_logits.float(), output.text_mask)
    assert torch.equal(parts.sums, compute_loss(rounded, codes, **SETTINGS).sums)


def test_of_a_model_padding_and_the_users_codes_are_not_predicted():
    model = tiny_model(torch.float32)
    codes = random_codes(model, batch=2, steps=9)
    codes[:, :, 7:] = -1
    parts = compute_loss(model(codes), codes, dep_q=model.dep_q)
    parts.loss.backward()
    assert parts.sums.shape == parts.counts.shape == (1 + model.dep_q,)
    assert parts.counts[1:].tolist() == [2 * 7, 2 * 7]
    assert parts.loss.item() > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    changed = codes.clone()
    changed[:, 1 + model.dep_q :, -1] = 5  # the last step is no input of any other
    torch.testing.assert_close(compute_loss(model(changed), changed, dep_q=model.dep_q).sums, parts.sums)
