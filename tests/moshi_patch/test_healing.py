"""A reset row is bitwise a fresh row whatever stood in it before, NaN and inf too, and no other row notices."""

import copy
import dataclasses
import math

import pytest
import torch
from moshi.models.lm import LMGen
from moshi.modules.transformer import RingKVCache

import moshi_patch
from moshi_patch.kinds.rows import _fill_masked_, fill_rows_
from tests.support.model_kinds import build, codes_for, conditions, fused
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model
from tests.support.streams import SETTINGS, steps, ttt_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]
ROWS, BEFORE, AFTER = 3, 12, 14
poisons = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])


def state_tensors(module) -> dict[str, torch.Tensor]:
    """Every tensor that belongs to rows, of all streaming states under `module`; rows first."""
    found = {}

    def collect(name, value):
        if isinstance(value, RingKVCache):
            found[f"{name}.cache"] = value.cache.transpose(0, 1)
            collect(f"{name}.end_offset", value.end_offset)
        elif dataclasses.is_dataclass(value):  # fast weights
            for key, tensor in vars(value).items():
                collect(f"{name}.{key}", tensor)
        elif isinstance(value, torch.Tensor):
            found[name] = value

    for name, state in module.get_streaming_state().items():
        for key, value in vars(state).items():
            if key not in ("initial", "k_cross", "v_cross", "condition_sum", "condition_cross"):  # of no stream
                collect(f"{name}.{key}", value)
    return found


def spoil(module, rows, poison) -> None:
    """Whatever can be wrong in these rows is."""
    for tensor in state_tensors(module).values():
        for row in rows:
            tensor[row] = poison if tensor.is_floating_point() else 1 - tensor[row].long()


def assert_fresh(module, blank, rows) -> None:
    for name, tensor in state_tensors(module).items():
        for row in rows:
            assert torch.equal(tensor[row], blank[name][row]), name


@poisons
@pytest.mark.parametrize("name", ["plain", "hidden_states", "clip and decay", "residual, K=5, decay, gain", "mlp"])
def test_a_spoilt_row_is_a_fresh_row_after_its_reset_and_the_others_go_on(name, poison):
    model = ttt_model(**SETTINGS[name])
    codes = random_codes(model, ROWS, BEFORE + AFTER)
    with model.streaming(ROWS):
        blank = copy.deepcopy(state_tensors(model))
        fresh = steps(model, codes[:, :, BEFORE:])
    with model.streaming(ROWS):
        steps(model, codes[:, :, :BEFORE])
        untouched = steps(model, codes[:, :, BEFORE:])
    with model.streaming(ROWS):
        steps(model, codes[:, :, :BEFORE])
        spoil(model, [0, 2], poison)
        model.reset_streaming(torch.tensor([True, False, True]))
        assert_fresh(model, blank, [0, 2])
        after = steps(model, codes[:, :, BEFORE:])
    assert torch.equal(after[0::2], fresh[0::2])
    assert torch.equal(after[1], untouched[1])
    assert not torch.equal(after[1], fresh[1])


@poisons
def test_a_full_reset_makes_everything_fresh(poison):
    model = ttt_model()
    codes = random_codes(model, ROWS, BEFORE)
    with model.streaming(ROWS):
        fresh = steps(model, codes)
    with model.streaming(ROWS):
        steps(model, codes)
        spoil(model, range(ROWS), poison)
        assert not steps(model, codes[:, :, :1]).isfinite().any()
        model.reset_streaming()
        assert torch.equal(steps(model, codes), fresh)


@pytest.mark.parametrize("settings", [{}, {"ttt_kind": "mlp"}], ids=["in_place", "mlp"])
def test_one_inf_in_one_fast_weight_does_not_outlive_the_reset(settings):
    """As it happens: everything behind it in the same row is spoilt step by step."""
    model = ttt_model(**settings)
    codes = random_codes(model, 1, 20)
    with model.streaming(1):
        fresh = steps(model, codes)
    with model.streaming(1):
        steps(model, codes)
        fast = next(iter(moshi_patch.ttt_memories(model).values()))._streaming_state.fast
        (fast.delta if hasattr(fast, "delta") else fast.delta2)[0, ..., 3, 5] = math.inf
        assert not steps(model, codes).isfinite().any()
        model.reset_streaming()
        assert torch.equal(steps(model, codes), fresh)


@poisons
@pytest.mark.parametrize("kind", ["hibiki", "tts"])
def test_models_with_cross_attention_heal(kind, poison):
    model = build(kind, TTT)
    codes, where = codes_for(model, 2, 2 * AFTER), fused(model, conditions(model, kind, 2))

    def run(part):
        with torch.no_grad():
            return torch.cat([model.forward_text(c, *where)[1] for c in part.split(1, 2)], 2)

    with model.streaming(2):
        fresh = run(codes[:, :, AFTER:])
    with model.streaming(2):
        run(codes[:, :, :AFTER])
        spoil(model, [1], poison)
        model.reset_streaming(torch.tensor([False, True]))
        after = run(codes[:, :, AFTER:])
    assert torch.equal(after[1], fresh[1])
    assert not torch.equal(after[0], fresh[0])


@poisons
@pytest.mark.parametrize("guided", [{}, {"cfg_coef": 2.0, "cfg_is_no_text": True}], ids=["plain", "guided"])
def test_a_reset_row_of_lmgen_is_that_of_a_fresh_generation(guided, poison):
    model = randomise_targets(tiny_model(**TTT))
    heard = random_codes(model, 2, BEFORE + AFTER)[:, 3:]

    def generate(lm_gen, part):
        return torch.cat([lm_gen.step(token) for token in part.split(1, 2)], 2)

    def generator():
        return LMGen(model, use_sampling=False, support_out_of_sync=True, **guided)

    lm_gen = generator()
    with lm_gen.streaming(2):
        fresh = generate(lm_gen, heard[:, :, BEFORE:])
    lm_gen = generator()
    with lm_gen.streaming(2):
        generate(lm_gen, heard[:, :, :BEFORE])
        untouched = generate(lm_gen, heard[:, :, BEFORE:])
    lm_gen = generator()
    with lm_gen.streaming(2):
        generate(lm_gen, heard[:, :, :BEFORE])
        spoil(lm_gen, [0], poison)
        spoil(model, [0, 2] if guided else [0], poison)
        lm_gen.reset_streaming(torch.tensor([True, False]))
        after = generate(lm_gen, heard[:, :, BEFORE:])
        assert moshi_patch.finite_rows(model).all()
    assert torch.equal(after[0], fresh[0])
    assert torch.equal(after[1], untouched[1])


@poisons
def test_the_depformers_own_caches_heal(poison):
    depformer = ttt_model().depformer
    x = torch.randn(2, 2, 8, dtype=torch.float64)

    def run():
        return torch.cat([depformer(step) for step in x.split(1, 1)], 1)

    with torch.no_grad(), depformer.streaming(2):
        fresh = run()
        spoil(depformer, [0], poison)  # its rows share a position
        depformer.reset_streaming()
        assert torch.equal(run(), fresh)


def test_a_restored_snapshot_heals_too():
    model = ttt_model()
    codes = random_codes(model, 1, BEFORE)
    with model.streaming(1):
        fresh = steps(model, codes)
        model.set_streaming_state(copy.deepcopy(model.get_streaming_state()))
        spoil(model, [0], math.nan)
        model.reset_streaming()
        assert torch.equal(steps(model, codes), fresh)


def test_a_copied_model_heals_its_own_rows():
    model = ttt_model()
    twin = copy.deepcopy(model)
    codes = random_codes(model, 1, BEFORE)
    with model.streaming(1), twin.streaming(1):
        fresh = steps(model, codes)
        spoil(twin, [0], math.nan)
        twin.reset_streaming()
        assert torch.equal(steps(twin, codes), fresh)
        assert moshi_patch.finite_rows(model).all()


def test_without_ttt_caches_are_stock():
    model = tiny_model()
    with model.streaming(1):
        caches = [s.kv_cache for s in model.get_streaming_state().values() if hasattr(s, "kv_cache")]
        assert {type(cache) for cache in caches} == {RingKVCache}


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_row_that_is_not_finite_is_named_until_its_reset(layer):
    """Wherever it begins, also behind the last TTT layer, and whether or not it executes later."""
    model = ttt_model()
    codes = random_codes(model, ROWS, BEFORE)
    with model.streaming(ROWS):
        steps(model, codes)
        assert moshi_patch.finite_rows(model).tolist() == [True] * ROWS
        model.transformer.layers[layer].self_attn._streaming_state.kv_cache.cache[1, 1] = math.nan
        model.set_exec_mask(torch.tensor([True, False, True]))
        steps(model, codes[:, :, :1])
        assert moshi_patch.finite_rows(model).tolist() == [True] * ROWS  # it has not answered
        model.set_exec_mask(torch.tensor([False, True, True]))
        steps(model, codes[:, :, :1])
        assert moshi_patch.finite_rows(model).tolist() == [True, False, True]
        steps(model, codes[:, :, :1])
        model.reset_streaming(torch.tensor([False, True, False]))
        steps(model, codes[:, :, :1])
        assert moshi_patch.finite_rows(model).tolist() == [True] * ROWS


def test_finite_rows_need_a_stream_and_a_model_with_ttt():
    with pytest.raises(ValueError, match="LMModel is not streaming"):
        moshi_patch.finite_rows(ttt_model())
    with pytest.raises(ValueError, match="LMModel has no TTT layer"):
        moshi_patch.finite_rows(tiny_model())


@pytest.mark.parametrize("fill", [fill_rows_, _fill_masked_], ids=["on a CPU", "elsewhere"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mask", [[False, False], [True, False], [True, True]], ids=str)
def test_rows_are_filled_and_the_others_are_not(mask, dim, fill):
    tensor = torch.full((2, 2, 3), math.nan)
    fill(tensor, torch.tensor(mask), 1.0, dim)
    filled = (tensor == 1.0).transpose(0, dim)
    assert filled.all((1, 2)).tolist() == mask == filled.any(2).any(1).tolist()
