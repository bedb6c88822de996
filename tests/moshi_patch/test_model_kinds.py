"""Every kind of Kyutai model, scaled down, with TTT: streaming equals one pass; the depformer has none."""

import pytest
import torch
from moshi.modules.gating import ActivationGating

import moshi_patch
from moshi_patch.kinds.in_place.ops import naive, naive_target
from tests.support.model_kinds import STEPS, build, codes_for, conditions, fused, kinds, precisions, streamed
from tests.support.models import TTT, TTT_MLP, relative

pytestmark = pytest.mark.usefixtures("patched")
MEMORIES = {
    "token_embeddings": {**TTT, "ttt_target": "token_embeddings"},
    "hidden_states": {**TTT, "ttt_target": "hidden_states"},
    "mlp": TTT_MLP,
}


@pytest.mark.parametrize("ttt", MEMORIES.values(), ids=MEMORIES)
@precisions
@kinds
def test_streaming_equals_one_pass_and_ttt_takes_part(kind, precision, ttt):
    overrides, dtype, tolerance = precision
    model = build(kind, {**overrides, **ttt}, dtype)
    codes, where = codes_for(model, 3), fused(model, conditions(model, kind, 3))
    with torch.no_grad():
        one_pass = model.forward_text(codes, *where)[1]
        with moshi_patch.ttt_updates(model):
            off = model.forward_text(codes, *where)[1]
    stepwise, stats = streamed(model, codes, where)
    assert relative(stepwise, one_pass) < tolerance
    assert relative(one_pass[:, :, 5:], off[:, :, 5:]) > 1e-3
    if ttt != TTT_MLP:
        assert torch.equal(one_pass[:, :, :5], off[:, :, :5])  # nothing is learnt before the first chunk has ended
    assert [layer["updates"] for layer in stats.values()] == [[STEPS // 5] * 3] * 2
    assert min(norm for layer in stats.values() for norm in layer["delta_norm"]) > 0


@pytest.mark.parametrize("target", ["token_embeddings", "hidden_states"])
@kinds
def test_every_layer_follows_the_specification_and_x0_holds_the_sum_condition(kind, target):
    model = build(kind, {**TTT, "ttt_target": target})
    codes, where = codes_for(model, 2), fused(model, conditions(model, kind, 2))
    embedded = [emb(codes[:, k]) for k, emb in enumerate([model.text_emb, *model.emb])]
    x0 = sum(embedded) + (0 if where[0] is None else where[0])
    seen = {}
    for name, gating in moshi_patch.ttt_gatings(model).items():
        gating.linear_out.register_forward_pre_hook(lambda _, args, name=name: seen.update({name + ".z": args[0]}))
        gating.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.no_grad():
        model.forward_text(codes, *where)
        for name, gating in moshi_patch.ttt_gatings(model).items():
            x, out = seen[name]
            generator, chunk_size = gating.target_generator, TTT["ttt_chunk_size"]
            source = x0 if target == "token_embeddings" else x
            v = naive_target(source, generator.conv1d.conv.weight, generator.W_target.weight, chunk_size)
            z, w_down = seen[name + ".z"], gating.linear_out.weight
            expected, delta = naive(z, v, w_down, chunk_size, TTT["ttt_learning_rate"])
            assert delta.any()
            assert relative(out, expected) < 1e-12


@pytest.mark.parametrize("ttt", [TTT, TTT_MLP], ids=["in_place", "mlp"])
@precisions
@kinds
def test_before_training_every_kind_answers_bitwise_as_without_ttt(kind, precision, ttt):
    overrides, dtype, _ = precision
    stock = build(kind, overrides, dtype, trained=False)
    model = build(kind, {**overrides, **ttt}, dtype, trained=False)
    codes = codes_for(model, 2)
    tensors, stock_tensors = conditions(model, kind, 2), conditions(stock, kind, 2)
    with torch.no_grad():
        ours, theirs = (m.forward_text(codes, *fused(m, t)) for m, t in ((model, tensors), (stock, stock_tensors)))
        assert torch.equal(ours[1], theirs[1])
        if kind != "stt":
            assert torch.equal(
                model(codes, tensors).logits.nan_to_num(), stock(codes, stock_tensors).logits.nan_to_num()
            )


@pytest.mark.parametrize(("ttt", "place"), [(TTT, "gating"), (TTT_MLP, "ttt")], ids=["in_place", "mlp"])
@kinds
def test_the_depformer_never_gets_ttt(kind, ttt, place):
    model = build(kind, {**ttt, "ttt_layers": "all"})
    assert list(moshi_patch.ttt_memories(model)) == [f"transformer.layers.{i}.{place}" for i in range(4)]
    stock = build(kind, {}, trained=False)
    added = model.state_dict().keys() - stock.state_dict().keys()
    assert sorted(added) == sorted(moshi_patch.ttt_parameters(model))
    if kind == "stt":
        assert model.depformer is None
        return
    steps = {"moshi": 2, "hibiki": 3, "tts": 3}[kind]
    for layer, stock_layer in zip(model.depformer.layers, stock.depformer.layers, strict=True):
        assert type(layer) is type(stock_layer)
        assert [type(gating) for gating in layer.gating] == [ActivationGating] * steps
    for module in model.depformer.modules():
        assert type(module).__module__.split(".")[0] in ("moshi", "torch")
        assert not module._forward_pre_hooks


@kinds
def test_an_mlp_reads_what_the_cross_attention_has_added(kind):
    model, seen = build(kind, TTT_MLP), {}
    layer = model.transformer.layers[1]
    crossed = layer.cross_attention is not None
    attention, norm = (layer.cross_attention, layer.norm_cross) if crossed else (layer.self_attn, layer.norm1)
    norm.register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
    attention.register_forward_hook(lambda _, args, out: seen.update(attended=out))
    layer.ttt.register_forward_pre_hook(lambda _, args: seen.update(read=args[0]))
    codes, where = codes_for(model, 2), fused(model, conditions(model, kind, 2))
    with torch.no_grad():
        model.forward_text(codes, *where)
    assert crossed == (kind in ("hibiki", "tts"))
    assert torch.equal(seen["read"], seen["before"] + seen["attended"])


@pytest.mark.parametrize("kind", ["moshi", "hibiki", "tts"])
def test_the_depformer_is_refused_settings_of_its_own(kind):
    with pytest.raises(ValueError, match=r"depformer_ttt_chunk_size=4.*depformer never gets TTT"):
        build(kind, {**TTT, "depformer_ttt_chunk_size": 4})
