"""`ttt.init_target: readout`: W_target leads from a token's embedding to its logit, and the model is still its base."""

import pytest
import torch

import moshi_patch
from finetune.common.distributed import Context
from finetune.model.adapters import add_adapters
from finetune.model.initial_targets import covariance, readout_projection, start_targets
from finetune.settings.record import from_dict
from finetune.training.build_model import build_model
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model
from tests.support.tiny_repository import build_repo

pytestmark = pytest.mark.usefixtures("patched")

ONE = Context(0, 1, 0, torch.device("cpu"))


def projections(model) -> list[torch.Tensor]:
    return [gating.target_generator.W_target.weight for gating in moshi_patch.ttt_gatings(model).values()]


def test_it_is_the_least_squares_map_from_all_codebooks_to_the_texts_output_direction():
    torch.manual_seed(0)
    tokens, width, number = 40, 12, 200_000
    embedding, readout = torch.randn(tokens, width) + 1.0, torch.randn(tokens, width)
    audio = torch.randn(30, width)
    drawn = torch.randint(tokens, (number,))
    source = embedding[drawn] + audio[torch.randint(30, (number,))]
    source, wanted = source - source.mean(0), (readout - readout.mean(0))[drawn]
    solution = torch.linalg.lstsq(source, wanted).solution.T
    found = readout_projection(embedding, readout, covariance(audio))
    assert found.norm().item() == pytest.approx(width**0.5)
    assert torch.cosine_similarity(found.flatten(), solution.flatten(), dim=0) > 0.99


def test_a_target_then_raises_the_logit_of_its_own_token():
    """Of text and audio drawn at random: by how much, in standard deviations of the other logits."""
    torch.manual_seed(1)
    model = tiny_model(torch.float32, **TTT)
    codes = random_codes(model, 8, 20)
    text = codes[:, 0].flatten()
    x0 = model.text_emb(codes[:, 0]) + sum(emb(codes[:, 1 + row]) for row, emb in enumerate(model.emb))

    def margin() -> float:
        logits = model.text_linear(x0 @ projections(model)[0].T).flatten(0, 1)
        own = logits.gather(1, text[:, None])[:, 0]
        return ((own - logits.mean(1)) / logits.std(1)).mean().item()

    with torch.no_grad():
        before = margin()
        start_targets(model, "readout")
        assert abs(before) < 0.5
        assert margin() > 0.8


def test_the_model_is_its_base_exactly_and_the_filters_have_a_gradient():
    plain, started = (tiny_model(torch.float32, **TTT) for _ in range(2))
    start_targets(started, "readout")
    codes = random_codes(plain, 2, 40)
    logits = [model.forward_text(codes)[1] for model in (plain, started)]
    assert torch.equal(*logits)
    logits[1].square().mean().backward()
    gatings = moshi_patch.ttt_gatings(started).values()
    assert all(gating.target_generator.conv1d.conv.weight.grad.any() for gating in gatings)


def test_the_identity_is_the_default_and_trained_generators_keep_what_they_learnt():
    model = tiny_model(torch.float32, **TTT)
    start_targets(model, "identity")
    assert all(torch.equal(weight, torch.eye(len(weight))) for weight in projections(model))
    randomise_targets(model)
    before = [weight.clone() for weight in projections(model)]
    start_targets(model, "readout")
    assert all(map(torch.equal, before, projections(model)))


def test_adapters_change_nothing_and_a_model_without_weights_is_left_alone():
    plain, adapted = (tiny_model(torch.float32, **TTT) for _ in range(2))
    add_adapters(adapted, 3, 2.0)
    for model in (plain, adapted):
        start_targets(model, "readout")
    assert all(map(torch.allclose, projections(plain), projections(adapted)))
    meta = tiny_model(torch.float32, **TTT).to("meta")
    start_targets(meta, "readout")
    assert all(weight.is_meta for weight in projections(meta))


def test_the_trainers_model_starts_with_it(tmp_path):
    repo = build_repo(tmp_path / "repo", ttt=False)
    ttt = {"enabled": True, "layers": [1, 3], "chunk_size": 16}
    settings = {"moshi_paths": {"hf_repo_id": str(repo)}, "lora": {"enable": True}, "param_dtype": "float32"}
    weights = {}
    for kind in ("identity", "readout"):
        args = from_dict(settings | {"ttt": ttt | {"init_target": kind}})
        weights[kind] = projections(build_model(args, ONE).model)
    assert all(torch.equal(weight, torch.eye(len(weight))) for weight in weights["identity"])
    assert not any(map(torch.allclose, weights["identity"], weights["readout"]))
    assert torch.equal(*weights["readout"])
