"""An hour of dialogue: what is told is asked for again after 1, 10, 30 and 60 minutes.

`python -m benchmarks.evidence.hour [--seeds 1] [--minutes 60] [--cache DIR] [--out FILE] [--fresh] [--report-only]`

A small model that was taught on short dialogues (`dialogue`) streams 45,000 steps, 12.5 a second. Facts are told at
the start and every ten minutes. Each is asked for once, so no question refreshes what another one asks. Where the
model has its turn, it hears what it has drawn from its own distribution, its answers included.

The result is `benchmarks/results/hour.json`; `report.hour` makes the table and the figure of docs/evidence_hour.md.

Shapes: `B` rows, `T` steps, through moshi's streaming state: one at a time where the model speaks.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.transformer import set_attention_context

import moshi_patch
from benchmarks.measure import argument_parser, parse_arguments, status_bytes, write_result

from .dialogue import CARD, MODEL, USER, Script, codes_of
from .model import EVAL_SEED, Diverged, evaluate
from .report.hour import DATA, report
from .settings import RESIDUAL, Settings
from .training import trained

MINUTE = 750
"""Steps of a minute at 12.5 a second."""
AGES = (1, 10, 30, 60)
EACH = 2
"""Facts per statement and age."""
ROWS = 16
SEGMENT = 16
"""Steps that are passed at once at most, while the model does not speak: the numbers are those of single steps."""
LAST_QUESTIONS = 60
"""Steps at the end in which the last facts are asked for."""

TAUGHT: dict[str, Any] = {
    **{"task": "dialogue", "base_task": "dialogue", "card": CARD, "batch": 8, "length": 320, "eval_batch": 64},
    **{"base_steps": 200, "steps": 600, "targets_first": 150, "then_rate": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the table.

    Args:
        settings: beside `TAUGHT`.
        updates: whether the model may write while it streams.
        talk: False leaves out all but facts and questions: silence in the place of small talk.
    """

    settings: dict[str, Any]
    updates: bool = True
    talk: bool = True


ARMS = {
    "residual": Arm(RESIDUAL),
    "residual, updates off": Arm(RESIDUAL, updates=False),
    "the paper's": Arm({"rate": 0.1}),
    "the paper's, η 1": Arm({"rate": 1.0}),
    "no TTT": Arm({"model": "none"}),
    "residual, silence instead of talk": Arm(RESIDUAL, talk=False),
}


def events(minutes: int) -> list[tuple[int, int, int, int]]:
    """What must happen: `(step, 1 for a statement, fact, age)`, questions before statements at the same step."""
    found, fact = [], 0
    for minute in range(0, minutes, 10):
        for age in (age for age in AGES for _ in range(EACH) if minute + age <= minutes):
            asked = min((minute + age) * MINUTE, minutes * MINUTE - LAST_QUESTIONS)
            found += [(minute * MINUTE, 1, fact, age), (asked, 0, fact, age)]
            fact += 1
    return sorted(found)


def write_script(
    rows: int, minutes: int, generator: torch.Generator, talk: bool = True
) -> tuple[Script, list[dict[str, int]]]:
    """The dialogue, and its questions: `age` in minutes, the steps `told` and `asked` of the value."""
    script = Script(rows, minutes * MINUTE, generator)
    told: dict[int, int] = {}
    questions = []
    for step, is_statement, fact, age in events(minutes):
        _until(script, step, talk)
        script.pause(script.number(1, 4))
        if is_statement:
            told[fact] = script.tell(fact)
        else:
            questions.append({"age": age, "told": told[fact], "asked": script.ask(fact)})
    _until(script, minutes * MINUTE, talk)
    return script, questions


def _until(script: Script, until: int, talk: bool) -> None:
    """Turns of one to four sentences of 2 to 8 words, and pauses, one in 32 of 6 to 30 seconds; or silence alone."""
    script.pause(0 if talk else max(0, until - script.at))
    speaker = USER
    while script.at < until:
        silence = script.number(2, 20) if script.number(0, 31) else script.number(75, 375)
        script.pause(min(until - script.at, silence))
        for _ in range(script.number(1, 4)):
            script.chat(min(until - script.at, script.number(2, 8)), speaker)
            script.pause(min(until - script.at, 1))
        speaker = USER + MODEL - speaker


@contextmanager
def _streaming(model: LMModel, rows: int, updates: bool, segment: int) -> Iterator[None]:
    """Streams with the model's own window, and room in the attention's cache for a segment beside it."""
    window = next(layer.self_attn.context for layer in model.transformer.layers)
    set_attention_context(model, window + segment - 1)  # the caches are made when the stream begins
    try:
        with model.streaming(rows), nullcontext() if updates else moshi_patch.ttt_updates(model):
            set_attention_context(model, window)
            yield
    finally:
        set_attention_context(model, window)


def segments(speaker: list[int], longest: int) -> list[tuple[int, int]]:
    """Begin and end of what is passed at once: up to the step before one that the model draws, at most `longest`."""
    found, begin, last = [], 0, len(speaker) - 1
    while begin < last:
        end = begin + 1
        while end < last and end - begin < longest and speaker[end] != MODEL:
            end += 1
        found.append((begin, end))
        begin = end
    return found


@torch.no_grad()
def stream(
    model: LMModel,
    updates: bool,
    seed: int,
    minutes: int = 60,
    rows: int = ROWS,
    segment: int = SEGMENT,
    talk: bool = True,
) -> dict[str, Any]:
    """Lets the model hear and speak the whole dialogue.

    Returns:
        `questions`: per question its `age` and steps, the mean `nats` and share of `hits` over rows, and `by_minute`:
        lists over minutes of `cpu_ms` (processor time of a step of the model's turns, median), `rss_mib` (resident
        memory of the process), `chat` (nats of the user's words), `entropy` (nats, where the model speaks) and
        `relative_delta` (a list per layer); None where nothing was there to measure.

    Raises:
        Diverged: when a number is not finite.
    """
    generator = torch.Generator().manual_seed(EVAL_SEED + 13 + seed)
    script, questions = write_script(rows, minutes, generator, talk)
    codes = codes_of(script.text, script.speaker)
    asked = {question["asked"]: question for question in questions}
    speaker = script.speaker.tolist()
    meter = _Meter(model)
    with _streaming(model, rows, updates, segment):
        for begin, end in segments(speaker, segment):
            clock = time.process_time()
            logits = model.forward_text(codes[:, :, begin:end])[1][:, 0]
            if end == begin + 1:
                meter.add("cpu_ms", 1e3 * (time.process_time() - clock))
            log_p = logits.log_softmax(-1)
            for t in range(begin, end):
                following, known = codes[:, 0, t + 1], log_p[:, t - begin]
                if t + 1 in asked:
                    asked[t + 1]["nats"] = round(F.nll_loss(known, following).item(), 4)
                    asked[t + 1]["hits"] = round((known.argmax(-1) == following).float().mean().item(), 4)
                elif speaker[t] == speaker[t + 1] == USER:
                    meter.add("chat", F.nll_loss(known, following).item())
            if speaker[end] == MODEL:
                chances = log_p[:, -1].exp()
                meter.add("entropy", -(chances * log_p[:, -1]).sum(-1).mean().item())
                codes[:, 0, end] = torch.multinomial(chances, 1, generator=generator)[:, 0]
            if end // MINUTE > len(meter.found["chat"]) or end + 1 == len(speaker):
                meter.close_minute()
    return {"questions": questions, "by_minute": meter.found}


class _Meter:
    """What is measured on the way, and read once a minute."""

    def __init__(self, model: LMModel):
        self.model = model
        self.found: dict[str, list] = {name: [] for name in ("cpu_ms", "chat", "entropy", "rss_mib", "relative_delta")}
        self._heard: dict[str, list[float]] = {name: [] for name in ("cpu_ms", "chat", "entropy")}

    def add(self, name: str, value: float) -> None:
        self._heard[name].append(value)

    def close_minute(self) -> None:
        self.found["rss_mib"].append(round(status_bytes("VmRSS") / 2**20, 2))
        for name, values in self._heard.items():
            average = (median if name == "cpu_ms" else mean)(values) if values else None
            if average is not None and not math.isfinite(average):
                raise Diverged(f"{name} is {average} in minute {len(self.found[name]) + 1}")
            self.found[name].append(None if average is None else round(average, 4))
            values.clear()
        if moshi_patch.ttt_gatings(self.model):
            stats = moshi_patch.ttt_stats(self.model).values()
            relative = [round(mean(one["relative_delta"]), 4) for one in stats]
            self.found["relative_delta"].append(relative)


_trained = functools.lru_cache(maxsize=4)(trained)


def run(arm: Arm, seed: int, minutes: int, cache: Path | None) -> dict[str, Any]:
    """Trains the model of an arm, measures it on held-out short dialogues, and lets it stream."""
    settings = Settings(**TAUGHT | arm.settings, seed=seed)
    model, training = _trained(settings, cache)
    final = evaluate(model.eval(), settings, arm.updates)[""]
    found = {"seed": seed, "id": settings.id, "training_cpu_seconds": training["cpu_seconds"], "held_out": final}
    try:
        return found | stream(model, arm.updates, seed, minutes, talk=arm.talk)
    except Diverged as error:
        return found | {"diverged": str(error)}


def _kept(path: Path, minutes: int) -> list[dict[str, Any]]:
    """What an earlier call of the same length has measured already."""
    data = json.loads(path.read_text()) if path.exists() else {"settings": {}, "runs": []}
    return data["runs"] if data["settings"].get("minutes") == minutes else []


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--cache", type=Path, help="folder for trained models")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results already hold")
    parser.add_argument("--report-only", action="store_true", help="table and figure from the committed results")
    parser.set_defaults(out=DATA, threads=1)
    args: argparse.Namespace = parse_arguments(parser, argv)
    if args.report_only:
        return report()
    if args.seeds < 1 or args.minutes < 1:
        parser.error(f"--seeds {args.seeds} --minutes {args.minutes}: both must be at least 1")
    moshi_patch.install()
    command = " ".join(["python -m benchmarks.evidence.hour", *(sys.argv[1:] if argv is None else argv)])
    cache, args.cache = args.cache, None  # a folder of this machine says nothing about the numbers
    runs = [] if args.fresh else _kept(args.out, args.minutes)
    for seed in range(args.seeds):
        for name, arm in ARMS.items():
            if not any((run["arm"], run["seed"]) == (name, seed) for run in runs):
                runs.append({"arm": name} | run(arm, seed, args.minutes, cache))
                write_result("hour", args, command=command, runs=runs)


if __name__ == "__main__":
    main()
