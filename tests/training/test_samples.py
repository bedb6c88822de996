"""A sample is what the model finds most probable after a prompt, and making one leaves nothing behind."""

import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune.data.loader import collate
from finetune.data.tokenize import Item
from finetune.model.conditions import condition_tensors
from finetune.training.samples import PROMPT_STEPS, Sample, _generate, make_sample, write_sample
from tests.support.model_kinds import attributes, build
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model

pytestmark = pytest.mark.usefixtures("patched")


class Tokenizer:
    """Stands for the speech tokenizer of a tiny model: its Mimi plays each code as a level."""

    zero_id, padding_id, end_padding_id, frame_rate = -1, 3, 0, 12.5

    def __init__(self, model):
        self.steps = 80
        self.mimi = SimpleNamespace(
            sample_rate=24_000, decode=lambda codes: codes[:, :1].repeat_interleave(1920, 2) / 32
        )
        self.text_tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), get_piece_size=lambda: 25)
        self.n_q, self.dep_q = model.n_q, model.dep_q


def loader_of(model, *lengths: int):
    items = []
    for seed, length in enumerate(lengths):
        codes = torch.full((1, model.num_codebooks, 80), -1)
        codes[..., :length] = random_codes(model, 1, length, seed=seed)
        items.append(Item(codes, None))

    class Loader:
        tokenizer = Tokenizer(model)

        def __iter__(self):
            return iter([collate(items)])

    return Loader()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_said_is_most_probable_in_one_pass_over_the_whole(checkpointing):
    """TTT learns along the way in both: the chunk of 5 steps is passed many times."""
    model = randomise_targets(tiny_model(**TTT, gradient_checkpointing=checkpointing))
    codes, prompt, end = random_codes(model, 1, 30), 11, 28
    said = _generate(model, codes, None, prompt, end)
    assert torch.equal(said[..., :prompt], codes[:, : 1 + model.dep_q, :prompt])
    whole = torch.cat([said, codes[:, 1 + model.dep_q :, :end]], 1)
    with torch.no_grad():
        out = model(whole)
    assert torch.equal(out.text_logits[..., prompt:, :].argmax(-1), said[:, :1, prompt:])
    logits, mask = out.logits[..., prompt:, :].nan_to_num(-1e9), out.mask[..., prompt:]
    assert mask.sum() > 2 * (end - prompt) - 5
    assert torch.equal(logits.argmax(-1)[mask], said[:, 1:, prompt:][mask])


def test_a_model_with_conditions_speaks_under_those_of_the_dialogue():
    model = build("hibiki", {**TTT, "ttt_layers": [1]}).eval()
    codes, given, prompt, end = random_codes(model, 1, 24), attributes("hibiki", 1), 6, 20
    said = _generate(model, codes, given, prompt, end)
    whole = torch.cat([said, codes[:, 1 + model.dep_q :, :end]], 1)
    with torch.no_grad():
        out = model(whole, condition_tensors(model, given))
    assert torch.equal(out.text_logits[..., prompt:, :].argmax(-1), said[:, :1, prompt:])


def test_making_a_sample_changes_neither_the_model_nor_any_random_number():
    model = randomise_targets(tiny_model(torch.float32, **TTT)).train()
    codes, before = random_codes(model, 1, 20), torch.get_rng_state()
    with torch.no_grad():
        expected = model(codes).text_logits
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, again = (make_sample(model, loader_of(model, 60)) for _ in range(2))
    assert (first.said, first.pcm.tolist()) == (again.said, again.pcm.tolist())
    assert model.training
    assert not model.is_streaming
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in parameters.items())
    with torch.no_grad():
        assert torch.equal(model(codes).text_logits, expected)


def test_the_prompt_is_the_recordings_and_the_first_dialogue_long_enough_is_taken():
    model = randomise_targets(tiny_model(torch.float32, **TTT))
    loader = loader_of(model, 2, 70)
    sample = make_sample(model, loader)
    recorded = next(iter(loader)).codes[1, 0].tolist()
    known = [token for token in recorded[:PROMPT_STEPS] if token not in (0, 3) and token < 25]
    assert sample.prompt == " ".join(map(str, known))
    assert sample.prompt_seconds == PROMPT_STEPS / 12.5
    assert sample.pcm.shape[1] == (PROMPT_STEPS + 70 // 2 - 1) * 1920
    assert sample.recorded
    assert make_sample(model, loader_of(model, 2, 3)) is None


def test_the_wav_has_moshi_left_and_the_user_right(tmp_path):
    pcm = np.stack([np.full(100, 0.5), np.full(100, -2.0)]).astype("float32")
    path = write_sample(tmp_path, 7, Sample(pcm, 24_000, 1.0, "good morning", "", "how are you"))
    assert path == tmp_path / "samples" / "step_000007.wav"
    with wave.open(str(path)) as file:
        frames = np.frombuffer(file.readframes(100), "<i2").reshape(-1, 2)
    assert frames[0].tolist() == [16383, -32767], "what is too loud is cut, it does not wrap"
    text = path.with_suffix(".txt").read_text()
    assert text.splitlines() == ["prompt (1.0 s): good morning", "the model: (no words)", "the recording: how are you"]
