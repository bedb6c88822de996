"""Nothing is mutated, and gradients are those of the loss at W_0: no forward pass writes a parameter."""

import gc

import pytest
import torch
from moshi.modules.transformer import StreamingTransformerLayer

import moshi_patch
from moshi_patch.call import current_call
from tests.support.models import TTT_MLP, random_codes, randomise_targets, relative, tiny_model, ttt_settings

pytestmark = pytest.mark.usefixtures("patched")


def ttt_model(**overrides):
    return randomise_targets(tiny_model(**{"positional_embedding": "none", **ttt_settings(**overrides)}))


def loss_of(model, codes):
    return model.forward_text(codes)[1].log_softmax(-1)[..., 0].mean()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other, tolerance=1e-12):
    assert one.keys() == other.keys()
    for name in one:
        assert relative(one[name], other[name]) < tolerance, name


KINDS = {"hebbian": {}, "residual": {"ttt_update": "residual"}, "mlp": {"ttt_kind": "mlp"}}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@every_kind
@pytest.mark.parametrize("mode", ["train", "eval", "streaming"])
def test_no_parameter_changes_and_state_dict_stays_as_it_is(mode, options):
    model = ttt_model(**options)
    model.train(mode == "train")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    codes = random_codes(model, 2, 33)
    if mode == "streaming":
        with model.streaming(2), torch.no_grad():
            for t in range(33):
                model.forward_text(codes[:, :, t : t + 1])
            assert min(min(stats["updates"]) for stats in moshi_patch.ttt_stats(model).values()) == 6
            during = model.state_dict()
            assert list(during) == list(before)
    else:
        model(codes).text_logits[..., 3:, :].sum().backward()
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ttt_delta_clip": 0.3, "ttt_decay": 0.8},
        {"ttt_target": "hidden_states", "ttt_target_gain": 2.0},
        {"ttt_update": "residual", "ttt_decay": 0.8, "ttt_target_gain": 2.0},
        {"ttt_update": "residual", "ttt_target": "hidden_states"},
        {"ttt_kind": "mlp"},
        {"ttt_kind": "mlp", "ttt_base_lr": 1.0, "ttt_scan_checkpoint_group_size": 2},
    ],
    ids=str,
)
def test_gradients_equal_finite_differences_of_the_loss_at_w0(options):
    model = ttt_model(**options).train()
    codes = random_codes(model, 2, 23)
    grads = gradients(model, loss_of(model, codes))
    gating = "transformer.layers.1.gating."
    names = [gating + "linear_in.weight", gating + "linear_out.weight", "text_emb.weight"]
    for name in [*names, *(name for name in moshi_patch.ttt_parameters(model) if ".1." in name)]:
        parameter = model.get_parameter(name)
        direction = torch.randn_like(parameter)
        step = 1e-5
        with torch.no_grad():
            parameter += step * direction
            upper = loss_of(model, codes)
            parameter -= 2 * step * direction
            lower = loss_of(model, codes)
            parameter += step * direction
        numeric = ((upper - lower) / (2 * step)).item()
        assert numeric == pytest.approx((grads[name] * direction).sum().item(), rel=1e-6), name


@every_kind
def test_two_forwards_before_one_backward_give_the_gradients_of_each_alone(options):
    model = ttt_model(**options).train()
    one, other = random_codes(model, 2, 23, seed=7), random_codes(model, 2, 33, seed=8)
    together = gradients(model, loss_of(model, one) + loss_of(model, other))
    first, second = gradients(model, loss_of(model, one)), gradients(model, loss_of(model, other))
    assert_same_gradients(together, {name: first[name] + second[name] for name in first})


@every_kind
def test_activation_checkpointing_gives_the_gradients_of_the_plain_run(options):
    plain, checkpointed = (ttt_model(gradient_checkpointing=on, **options).train() for on in (False, True))
    codes = random_codes(plain, 2, 33)
    assert checkpointed.transformer.checkpointing
    expected = gradients(plain, loss_of(plain, codes))
    assert_same_gradients(gradients(checkpointed, loss_of(checkpointed, codes)), expected)
    both = loss_of(checkpointed, codes) + loss_of(checkpointed, codes.flip(2))
    flipped = gradients(plain, loss_of(plain, codes.flip(2)))
    assert_same_gradients(gradients(checkpointed, both), {n: expected[n] + flipped[n] for n in expected})


@pytest.mark.parametrize(
    "options",
    [{"ttt_conv_kernel_size": 3}, {"ttt_conv_kernel_size": 3, "ttt_update": "residual"}, {"ttt_kind": "mlp"}],
    ids=str,
)
def test_no_output_of_the_whole_model_depends_on_a_later_input(options):
    model = ttt_model(**options)
    steps = 18
    x = torch.randn(1, steps, model.dim, dtype=torch.float64, requires_grad=True)
    out = model.transformer(x)
    for t in range(steps):
        (grad,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        assert (grad[0, t + 1 :] == 0).all(), t
        assert (grad[0, : t + 1] != 0).any(1).all(), t


def test_the_input_of_the_stack_is_remembered_by_nobody_after_the_call():
    model = ttt_model()
    model.forward_text(random_codes(model, 1, 12))
    assert current_call.get() is None
    layer = model.transformer.layers[1]
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3, 5), ttt_x0=torch.zeros(1, 3, 16))
    assert current_call.get() is None


@pytest.mark.parametrize(
    "options", [{"ttt_target": "token_embeddings"}, {"ttt_target": "hidden_states"}, {"ttt_kind": "mlp"}], ids=str
)
@pytest.mark.parametrize("muted", ["forward", "backward"])
def test_a_checkpointed_layer_is_recomputed_with_the_switch_of_its_forward(muted, options):
    overrides = {"layer_scale": 0.3, **options}
    plain = ttt_model(**overrides).train()
    checkpointed = ttt_model(gradient_checkpointing=True, **overrides).train()
    codes = random_codes(plain, 2, 23)
    results = []
    for model in (plain, checkpointed):
        with moshi_patch.ttt_updates(model, enabled=muted == "backward"):
            loss = loss_of(model, codes)
        with moshi_patch.ttt_updates(model, enabled=muted == "forward"):
            results.append(gradients(model, loss))
    assert_same_gradients(*results)
    learning = any(gradient.any() for name, gradient in results[0].items() if "target_gen" in name or "_lr_" in name)
    assert learning == (muted == "backward")


@every_kind
def test_a_checkpointed_layer_is_recomputed_as_bypassed_as_in_its_forward(options):
    plain = ttt_model(**options).train()
    checkpointed = ttt_model(gradient_checkpointing=True, **options).train()
    codes = random_codes(plain, 2, 23)
    results = []
    for model in (plain, checkpointed):
        with moshi_patch.ttt_bypassed(model):
            loss = loss_of(model, codes)
        results.append(gradients(model, loss))
    assert_same_gradients(*results)
    assert not set(results[0]) & set(moshi_patch.ttt_parameters(plain))


def test_hooks_on_the_down_projection_see_its_own_output():
    model = ttt_model().train()
    linear = model.transformer.layers[1].gating.linear_out
    seen = {}
    linear.register_forward_hook(lambda _, args, out: seen.update(z=args[0], out=out))
    linear.register_full_backward_hook(lambda _, grad_in, grad_out: seen.update(grad=grad_out[0]))
    loss_of(model, random_codes(model, 2, 23)).backward()
    assert torch.equal(seen["out"], seen["z"] @ linear.weight.T)
    assert seen["grad"].abs().max() > 0


@pytest.mark.parametrize("ttt", [ttt_settings(), TTT_MLP], ids=["in_place", "mlp"])
def test_a_layer_class_of_the_users_own_stays_in_place(ttt):
    class Doubled(StreamingTransformerLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    stock, fresh = tiny_model(layer_class=Doubled), tiny_model(**ttt, layer_class=Doubled)
    codes = random_codes(stock, 2, 23)
    assert all(type(layer) is Doubled for layer in fresh.transformer.layers)
    assert torch.equal(fresh.forward_text(codes)[1], stock.forward_text(codes)[1])
    assert not torch.equal(fresh.forward_text(codes)[1], tiny_model().forward_text(codes)[1])


@every_kind
def test_activation_checkpointing_keeps_nothing_of_the_layers_width_alive(options):
    """A tensor kept on the side of autograd's own would survive checkpointing, one per layer."""
    model = ttt_model(gradient_checkpointing=True, ttt_layers="all", **options).train()
    shape = (2, 33, model.transformer.layers[0].gating.linear_out.weight.shape[1])
    loss = loss_of(model, random_codes(model, 2, 33))
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.shape == shape]
    loss.backward()
    assert not alive
