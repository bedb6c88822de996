"""`LMGen` of every kind of model, guided or not, equals one pass over what it heard and said, row by row."""

import pytest
import torch
from moshi.models import LMGen, LMModel

import moshi_patch
from tests.support.model_kinds import STEPS, build, conditions, fused
from tests.support.models import BY_KIND, relative

pytestmark = pytest.mark.usefixtures("patched")


GUIDED = {"cfg_coef": 3.0}
NO_TEXT = {"cfg_coef": 3.0, "cfg_is_no_text": True}
GENERATIONS = {
    "moshi": ("moshi", {}),
    "moshi-guided_without_text": ("moshi", NO_TEXT),
    "hibiki": ("hibiki", {}),
    "hibiki-guided": ("hibiki", GUIDED),
    "stt": ("stt", {}),
    "tts": ("tts", {}),
    "tts-guided_without_text": ("tts", NO_TEXT),
    "tts-guided_without_prefix": ("tts", {**NO_TEXT, "cfg_is_masked_until": [9, 4]}),
}
ROWS = 2


class Generation:
    """An `LMGen` of `ROWS` rows in its streaming context, and what the model was given and answered at every step.

    `start` shifts the user's tokens and, for text-to-speech, the text that is given in place of the model's own.
    """

    def __init__(self, model: LMModel, kind: str, start: int = 0, **settings):
        self.inputs, self.logits, self.shown, self.extra = [], [], [], []
        self.model, self.kind, self.step = model, kind, start
        self.guided = "cfg_coef" in settings
        self.conditions = conditions(model, kind, ROWS, self.guided)
        generator = torch.Generator().manual_seed(8)
        self.user = torch.randint(0, model.card, (ROWS, model.n_q - model.dep_q, 99), generator=generator)
        self.text = torch.randint(0, 4 * (model.text_card + 1), (ROWS, 99), generator=generator)
        self.gen = LMGen(
            model,
            use_sampling=False,
            check=kind != "tts",  # it takes two texts in one token for a token out of range
            support_out_of_sync=True,
            condition_tensors=self.conditions,
            on_text_logits_hook=lambda logits: self.shown.append(logits.clone()),
            on_text_hook=self.say if kind == "tts" else None,
            **settings,
        )

    def say(self, token: torch.Tensor) -> None:
        token.copy_(self.text[:, self.step])

    def __enter__(self):
        def record(codes, *where):
            out = LMModel.forward_text(self.model, codes, *where)
            self.inputs.append(codes)
            self.logits.append(out[1])
            return out

        self.model.forward_text = record
        self.streaming = self.gen.streaming(ROWS)
        return self

    def __exit__(self, *error):
        self.streaming.close()
        del self.model.forward_text

    def run(self, steps: int) -> None:
        for _ in range(steps):
            tokens = self.user[:, :, self.step : self.step + 1]
            if self.kind == "stt":
                self.extra.append(self.gen.step_with_extra_heads(tokens)[1])
            else:
                self.gen.step(tokens)
            self.step += 1

    def states(self) -> list[dict[str, torch.Tensor]]:
        """A copy of the fast-weight state of each TTT layer."""
        memories = moshi_patch.ttt_memories(self.model).values()
        return [{k: v.clone() for k, v in vars(memory._streaming_state.fast).items()} for memory in memories]


every_memory = pytest.mark.parametrize("ttt", BY_KIND.values(), ids=BY_KIND)


@every_memory
@pytest.mark.parametrize(("kind", "settings"), GENERATIONS.values(), ids=GENERATIONS.keys())
def test_what_lmgen_answers_equals_one_pass_over_what_it_heard_and_said(kind, settings, ttt):
    model = build(kind, ttt)
    with Generation(model, kind, **settings) as run:
        run.run(STEPS)
        states = run.states()
    rows = 2 * ROWS if run.guided else ROWS
    codes, logits, shown = torch.cat(run.inputs, 2), torch.cat(run.logits, 2), torch.cat(run.shown, 2)
    with torch.no_grad():
        out, one_pass = model.forward_text(codes, *fused(model, run.conditions))
        with moshi_patch.ttt_updates(model):
            off = model.forward_text(codes, *fused(model, run.conditions))[1]
    assert len(codes) == rows
    assert relative(logits, one_pass) < 1e-12
    assert relative(one_pass, off) > 1e-3
    guided, null = one_pass.split(ROWS) if run.guided else (one_pass, one_pass)
    coefficient = settings["cfg_coef"] if settings == GUIDED else 1.0
    assert relative(shown, null + (guided - null) * coefficient) < 1e-12
    for state in states:
        (delta,) = (state[name] for name in ("delta", "delta1") if name in state)
        assert delta.shape[0] == rows
        assert state["updates"].tolist() == [STEPS // 5] * rows
        assert all(not torch.equal(delta[i], delta[j]) for i in range(rows) for j in range(i))
    for head, answers in zip(model.extra_heads, zip(*run.extra, strict=True), strict=bool(run.extra)):
        assert relative(torch.cat(answers, 1), head(out).softmax(-1)) < 1e-12


@every_memory
@pytest.mark.parametrize("case", ["moshi", "hibiki-guided", "tts-guided_without_text"])
def test_resetting_one_row_of_lmgen_resets_both_its_halves_and_no_other(case, ttt):
    kind, settings = GENERATIONS[case]
    model = build(kind, ttt)
    with Generation(model, kind, start=8, **settings) as fresh:
        fresh.run(STEPS)
    with Generation(model, kind, **settings) as run:
        blank = run.states()
        run.run(8)
        before = run.states()
        run.gen.reset_streaming(torch.tensor([True, False]))
        for start, old, new in zip(blank, before, run.states(), strict=True):
            for name, value in new.items():
                assert torch.equal(value[0::ROWS], start[name][0::ROWS]), name
                assert torch.equal(value[1::ROWS], old[name][1::ROWS]), name
        run.run(STEPS)
    again, reference = torch.cat(run.logits[8:], 2), torch.cat(fresh.logits, 2)
    assert relative(again[0::ROWS], reference[0::ROWS]) < 1e-12
    assert relative(again[1::ROWS], reference[1::ROWS]) > 1e-3  # the other one has a longer past


@every_memory
@pytest.mark.parametrize("case", ["moshi", "hibiki-guided", "tts-guided_without_text"])
def test_pausing_one_row_of_lmgen_pauses_both_its_halves_and_no_other(case, ttt):
    kind, settings = GENERATIONS[case]
    model = build(kind, ttt)
    with Generation(model, kind, **settings) as run:
        run.run(7)
        before = run.states()
        run.gen.set_exec_mask(torch.tensor([False, True]))
        run.run(4)
        for old, new in zip(before, run.states(), strict=True):
            for name, value in new.items():
                assert torch.equal(value[0::ROWS], old[name][0::ROWS]), name
            assert new["position"][1::ROWS].tolist() == [11] * (len(new["position"]) // ROWS)
            assert new["updates"].tolist() == [1, 2] * (len(new["updates"]) // ROWS)
