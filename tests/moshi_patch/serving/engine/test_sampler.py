"""A row's draws: from its own seed, position and settings alone, with the probabilities that the logits say."""

import pytest
import torch
from moshi.models import LMGen
from moshi.utils.sampling import sample_token

from moshi_patch.serving.engine.sampler import MAX_CANDIDATES, RowLMGen, Sampling, gumbel, mix, place_bits, sample
from tests.support.model_kinds import build, conditions
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model

VOCABULARY = 40


def draw(logits: torch.Tensor, seeds, positions, temperature: float = 0.8, top_k: int = 25, codebook: int = 1):
    """`[N]` tokens drawn from the same logits `[V]` at each of N positions and seeds."""
    seeds, positions = torch.broadcast_tensors(torch.as_tensor(seeds), torch.as_tensor(positions))
    count = len(seeds)
    settings = torch.full((count,), temperature, dtype=torch.float64), torch.full((count,), top_k)
    return sample(logits.expand(count, -1), place(seeds, positions, codebook), *settings, MAX_CANDIDATES)


def place(seeds: torch.Tensor, positions: torch.Tensor, codebook: int) -> torch.Tensor:
    """`[B]`, of codebook 1 to 4 among others, as the model asks for them."""
    return place_bits(seeds, positions, torch.arange(5))[:, codebook]


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))


def deviation(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square less its mean, in standard deviations; tokens that are expected less than 5 times count as one."""
    found = torch.bincount(tokens, minlength=len(expected)).double()
    often = expected >= 5
    pairs = torch.stack([found, expected])
    pairs = torch.cat([pairs[:, often], pairs[:, ~often].sum(1, keepdim=True)], 1)
    pairs = pairs[:, pairs[1] > 0]
    freedom = pairs.shape[1] - 1
    return ((((pairs[0] - pairs[1]) ** 2 / pairs[1]).sum() - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize("over", ["positions", "seeds"])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.8, 25), (1.5, 7), (0.3, MAX_CANDIDATES)])
def test_tokens_come_as_often_as_their_probabilities_say(logits, over, temperature, top_k):
    count = 20_000
    numbers, zero = torch.arange(count), torch.zeros((), dtype=torch.long)
    pair = (zero + 5, numbers) if over == "positions" else (numbers, zero + 5)
    tokens = draw(logits, *pair, temperature, top_k)
    likely = logits.topk(min(top_k, VOCABULARY))
    probabilities = torch.zeros(VOCABULARY, dtype=torch.float64)
    probabilities[likely.indices] = torch.softmax(likely.values.double() / temperature, 0)
    assert (probabilities[tokens] > 0).all()
    assert deviation(tokens, count * probabilities) < 4
    warmer = torch.zeros(VOCABULARY, dtype=torch.float64)
    warmer[likely.indices] = torch.softmax(likely.values.double() / (1.2 * temperature), 0)
    assert deviation(tokens, count * warmer) > 10  # so that a wrong temperature would show


def test_neither_the_next_position_nor_codebook_nor_seed_is_told_by_this_one(logits):
    numbers, flat = torch.arange(20_000), torch.zeros(8)
    base = draw(flat, 3, numbers)
    for other in (draw(flat, 3, numbers + 1), draw(flat, 3, numbers, codebook=2), draw(flat, 4, numbers)):
        pairs = 8 * base + other
        assert deviation(pairs, torch.full((64,), len(numbers) / 64, dtype=torch.float64)) < 4


def test_noise_is_gumbels_and_a_hash_is_one_to_one():
    zeros = torch.zeros(300, dtype=torch.long)
    noise = gumbel(place(torch.arange(300), zeros, 0), torch.arange(100).expand(300, -1))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.03)
    assert len(mix(torch.arange(100_000)).unique()) == 100_000
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the first three of splitmix64 from 0
    states = torch.arange(1, 4) * (0x9E3779B97F4A7C15 - (1 << 64))
    assert [number % (1 << 64) for number in mix(states).tolist()] == published


def test_a_row_draws_the_same_wherever_it_stands_and_whoever_stands_beside_it(logits):
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(8, VOCABULARY, generator=generator)
    seeds, positions = torch.arange(8) * 7919, torch.arange(8) * 3
    settings = torch.linspace(0.2, 2, 8, dtype=torch.float64), torch.arange(8) * 5 + 1
    tokens = sample(batch, place(seeds, positions, 2), *settings, MAX_CANDIDATES)
    order = torch.randperm(8, generator=generator)
    moved = [part[order] for part in (batch, seeds, positions, *settings)]
    moved[0][:4], moved[1][:4], moved[3][:4] = torch.nan, 0, 0  # the neighbours are others, and not finite
    again = sample(moved[0], place(*moved[1:3], 2), *moved[3:], MAX_CANDIDATES)
    assert torch.equal(again[4:], tokens[order][4:])


def test_temperature_zero_takes_what_stock_takes(logits):
    tied = torch.zeros(4, VOCABULARY, dtype=torch.bfloat16)
    tied[:, [30, 7, 11]] = 1
    for values in (logits.expand(4, -1), tied):
        zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.long)
        anywhere = place(torch.arange(4), torch.arange(4), 0)
        tokens = sample(values, anywhere, zero, 25 * one, MAX_CANDIDATES)
        assert torch.equal(tokens, sample_token(values.float(), False))
    assert torch.equal(draw(logits, torch.arange(50), 0, 1.0, top_k=1), logits.argmax().expand(50))


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("seed", 1 << 64, "a whole number of 64 bits"),
        ("seed", 0.5, "a whole number of 64 bits"),
        ("seed", True, "a whole number of 64 bits"),
        ("temperature", -0.1, "a number from 0 to 100"),
        ("temperature", float("nan"), "a number from 0 to 100"),
        ("temperature_text", float("inf"), "a number from 0 to 100"),
        ("temperature_text", "warm", "a number from 0 to 100"),
        ("top_k", -1, "a whole number, 0 or more"),
        ("top_k_text", 2.5, "a whole number, 0 or more"),
        ("top_k", 1 << 40, "a whole number, 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(argument, value, allowed):
    with pytest.raises(ValueError, match=rf"{argument}={value!r}: must be {allowed}"):
        Sampling(**{argument: value})


@torch.no_grad()
def generate(lm_gen: LMGen, codes: torch.Tensor) -> torch.Tensor:
    """`[T, B, K]` tokens; those of the first steps, which codebooks are delayed by, are left out."""
    with lm_gen.streaming(len(codes)):
        out = [lm_gen.step(codes[:, :, t : t + 1]) for t in range(codes.shape[2])]
    return torch.stack([tokens[:, :, 0] for tokens in out[lm_gen.max_delay :]])


GREEDY = Sampling(temperature=0, temperature_text=0)


@pytest.mark.parametrize("kind", ["moshi", "guided"])
def test_a_greedy_row_says_what_stock_says(kind, patched):
    if kind == "moshi":
        model, settings = randomise_targets(tiny_model(**TTT)), {}
    else:
        model = build("hibiki", TTT)
        settings = {"condition_tensors": conditions(model, "hibiki", 3, guided=True), "cfg_coef": 3.0}
    codes = random_codes(model, 3, 17)[:, model.dep_q + 1 :]
    rows = RowLMGen(model, 3, **settings)
    for row in range(3):
        rows.sampling.assign(row, GREEDY)
    said = generate(rows, codes)
    model.set_streaming_detached(False)
    assert torch.equal(said, generate(LMGen(model, use_sampling=False, **settings), codes))


def test_each_row_has_settings_of_its_own_and_the_seed_alone_decides(patched):
    model = randomise_targets(tiny_model(torch.float32, **TTT))
    codes = random_codes(model, 4, 25)[:1, model.dep_q + 1 :].expand(4, -1, -1)

    def said(*samplings: Sampling) -> torch.Tensor:
        rows = RowLMGen(model, 4)
        for row, sampling in enumerate(samplings):
            rows.sampling.assign(row, sampling)
        return generate(rows, codes).unbind(1)

    warm = Sampling(seed=-3, temperature=1.5, temperature_text=1.5)
    first, second, third, fourth = said(Sampling(seed=1), Sampling(seed=1), Sampling(seed=2), GREEDY)
    assert torch.equal(first, second)
    assert len({tuple(row.flatten().tolist()) for row in (first, third, fourth)}) == 3
    again = said(warm, GREEDY, Sampling(seed=2), Sampling(seed=1))
    for one, other in zip(again[1:], (fourth, third, first), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(said(Sampling(seed=(1 << 64) - 3, temperature=1.5, temperature_text=1.5))[0], again[0])
