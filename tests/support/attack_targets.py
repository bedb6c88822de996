"""Small checkpoints to break, and what each program does with one: refuses it in a line, accepts it, or worse."""

import contextlib
import io
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import moshi_patch
from finetune.checkpoint.checkpointer import Checkpointer
from finetune.checkpoint.initial import load_initial_weights
from finetune.checkpoint.training_state import TrainState
from finetune.common.errors import ConfigError
from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main as evaluate
from finetune.export.__main__ import main as export
from finetune.model.trainable import parameter_groups
from finetune.settings.record import from_dict
from finetune.training.build_model import BuiltModel, build_model
from finetune.training.optimizer import build_optimizer
from tests.support.attacks import PROGRAMS, SECRET, Attack, all_attacks
from tests.support.checkpoint_runs import CTX, Place, advance
from tests.support.models import randomise_targets
from tests.support.tiny_repository import DATA, build_repo

SMALL = {
    "dim": 8,
    "num_heads": 2,
    "num_layers": 2,
    "n_q": 4,
    "dep_q": 2,
    "delays": [0, 0, 1, 0, 1],
    "depformer_dim": 8,
    "depformer_dim_feedforward": 16,
    "depformer_num_layers": 1,
}
MODES = {"full": {"full_finetuning": True}, "adapters": {"lora": {"enable": True, "rank": 2}}}
REFUSED, ACCEPTED, WORSE = "refused in one line", "accepted", "traceback"


@dataclass
class Targets:
    """What the attacks begin with, in `folder`: `base`, `full`, `adapters` and `export`; never changed itself."""

    folder: Path
    built: dict[str, BuiltModel]
    states: dict[str, TrainState]

    @classmethod
    def make(cls, folder: Path) -> "Targets":
        base = build_repo(folder / "base", ttt=False, **SMALL)
        (folder / "eval.jsonl").write_text(json.dumps({"path": str(DATA / "boat.wav"), "duration": 11.0}))
        built, states = {}, {}
        for mode in MODES:
            args = arguments(folder, mode)
            built[mode] = build_model(args, CTX)
            randomise_targets(built[mode].model)
            groups = parameter_groups(built[mode].model, args)
            states[mode] = TrainState(
                0, built[mode].model, *build_optimizer(groups, args.optim, args.max_steps), Place()
            )
            advance(states[mode])
            Checkpointer(folder / mode, args, built[mode].lm_config, CTX).save(states[mode])
        assert export([str(folder / "full"), str(folder / "export")]) == 0
        assert base.is_dir()
        return cls(folder, built, states)

    def attacked(self, attack: Attack, place: Path) -> None:
        """A copy in `place` of what the attack is done to, broken."""
        (place / "secret.key").write_text(SECRET)
        (place / "secret.json").write_text(json.dumps({"secret": SECRET}))
        run = "adapters" if attack.target == "base" else attack.target
        shutil.copytree(self.folder / run, place / run)
        shutil.copytree(self.folder / "base", place / "base")
        shutil.copy(self.folder / "eval.jsonl", place)
        inner = "checkpoints/checkpoint_000001/consolidated" if attack.target in MODES else ""
        attack.do(place / attack.target / inner)

    def outcome(self, program: str, attack: Attack, place: Path) -> str:
        """What a program of `PROGRAMS` does with the attacked copy in `place`."""
        run = "adapters" if attack.target == "base" else attack.target
        errors, code = io.StringIO(), 1
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                code = self._run(PROGRAMS[program], run, place)
        except ConfigError as error:
            return REFUSED if "\n" not in str(error) else WORSE
        except (Exception, SystemExit):
            return WORSE
        if code == 0:
            return ACCEPTED
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("python")]
        return REFUSED if program == "d" or len(lines) == 1 else WORSE

    def _run(self, program: str, run: str, place: Path) -> int:
        path, base = str(place / run), str(place / "base")
        named = [] if run == "export" else [f"--base={base}"]
        if program == "doctor":
            return doctor([path, *named])
        if program == "export":
            return export([path, str(place / "out"), *named, "--with-base"])
        if program == "evaluate":
            paths = [] if run == "export" else [f"--moshi_paths.hf_repo_id={base}"]
            words = [f"--data.eval_data={place / 'eval.jsonl'}", "--max_minutes=0.05", f"--out_dir={place / 'results'}"]
            return evaluate([f"--checkpoint_dir={path}", *words, *paths])
        mode = run if run in MODES else "full"
        if program == "init_from":
            load_initial_weights(path, self.built[mode].model, CTX)
            return 0
        checkpointer = Checkpointer(place / run, arguments(place, mode), self.built[mode].lm_config, CTX)
        checkpointer.load(checkpointer.find(), self.states[mode])
        return 0


def arguments(folder: Path, mode: str):
    ttt = {"enabled": True, "layers": [1], "chunk_size": 8, "learning_rate": 0.03}
    common = {"run_dir": str(folder / mode), "moshi_paths": {"hf_repo_id": str(folder / "base")}, "ttt": ttt}
    return from_dict({**common, "param_dtype": "float32", **MODES[mode]})


def main(folder: Path) -> None:
    """Prints a table: how often each program did what."""
    logging.disable()
    torch.set_num_threads(1)
    moshi_patch.install()
    targets = Targets.make(folder / "targets")
    counts = {program: dict.fromkeys((REFUSED, ACCEPTED, WORSE), 0) for program in PROGRAMS}
    for number, attack in enumerate(all_attacks()):
        place = folder / str(number)
        place.mkdir()
        targets.attacked(attack, place)
        for program in attack.refused_by:
            outcome = targets.outcome(program, attack, place)
            counts[program][outcome] += 1
            if outcome != REFUSED:
                print(f"{PROGRAMS[program]}: {attack.name}: {outcome}")
        shutil.rmtree(place)
    print(f"{len(all_attacks())} attacks")
    for program, found in counts.items():
        print(f"{PROGRAMS[program]:10}", ", ".join(f"{number} {outcome}" for outcome, number in found.items()))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
