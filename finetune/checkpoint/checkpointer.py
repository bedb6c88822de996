"""Checkpoints that appear whole or not at all, keep the newest few, and continue a run exactly.

    RUN_DIR/checkpoints/checkpoint_000500/
        SHA256SUMS                                         of all files in training_state
        consolidated/{lora | consolidated | ttt}.safetensors
                                                           what is served, with the keys of stock moshi
        consolidated/config.json                           for moshi's `--config-path`, every `ttt_` setting included
        consolidated/training_config.json                  the training configuration, and versions
        consolidated/SHA256SUMS                            of the weights and of the training configuration
        training_state/                                    for `--resume`, by torch.distributed.checkpoint

A checkpoint is written as `.tmp-checkpoint_000500` and renamed when all of it is on the disk. Before one is deleted it
is renamed to `.old-checkpoint_000500`. Folders with these names, left by a killed process, are ignored and deleted at
the next save.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

import moshi_patch

from ..common.checksums import write_checksums
from ..common.disk import reason_of
from ..common.distributed import Context, on_rank_0
from ..common.errors import ConfigError, DiskError
from ..common.files import sync, write_json
from ..common.versions import versions
from ..settings.modes import saves, saves_adapters, saves_trained_alone
from ..settings.record import to_dict
from ..settings.schema import TrainArgs
from .base_fingerprint import BaseFingerprint, fingerprint_of
from .best import read_best
from .folders import ADAPTERS, MERGED, TRAINED, checkpoint_name, find_weights, list_checkpoints, relocate_adapters
from .resume import log_changes, open_resumable, refuse_other_model
from .state_files import STATE, is_resumable, write_state_checksums
from .training_state import TrainState, load_training_state, save_training_state
from .weights import collect_weights, ttt_tensors

logger = logging.getLogger(__name__)

LEFTOVER = re.compile(r"\.(tmp|old)-checkpoint_\d{6,}")


class Checkpointer:
    """Saves, finds and loads the checkpoints of one run. All ranks call each method, with the same arguments.

    Args:
        lm_config: content of `config.json` for the model as it is trained: arguments of `LMModel`, `ttt_` ones and
            `lora`, `lora_rank`, `lora_scaling` included.
    """

    def __init__(self, run_dir: Path, args: TrainArgs, lm_config: dict[str, Any], ctx: Context):
        self.folder = Path(run_dir) / "checkpoints"
        self.args, self.ctx = args, ctx
        self.lm_config = json.loads(json.dumps(lm_config))
        self.adapters, self.trained_alone = saves_adapters(args), saves_trained_alone(args)
        self._current: Path | None = None

    def save(self, state: TrainState) -> Path | None:
        """Writes the checkpoint of `state.step` and removes those beyond `num_ckpt_keep`. Returns its folder.

        Saving the same step again does nothing. Checkpoints of later steps, from before the run went back to an
        earlier one, are renamed to `abandoned-checkpoint_...` and never deleted: the newest is always this run's own.

        Returns:
            None when `do_ckpt` is false, or nothing trains.

        Raises:
            DiskError: on all ranks, when something cannot be written; the checkpoints there are stay as they are, and
                nothing is left of the new one.
        """
        if not saves(self.args):
            return None
        final = self.folder / checkpoint_name(state.step)
        if final == self._current:
            return final
        temporary = self.folder / f".tmp-{final.name}"
        on_rank_0(self.ctx, lambda: self._prepare(temporary))
        with self._writing(temporary):
            sums = save_training_state(temporary / STATE, state, self.ctx)
        dtype = getattr(torch, self.args.param_dtype)
        weights = collect_weights(
            state.model, self.ctx, adapters=self.adapters, dtype=dtype, trained_alone=self.trained_alone
        )
        header = {"format": "pt"}
        if self.trained_alone:
            header |= BaseFingerprint(fingerprint_of(sums), self.args.param_dtype).metadata()
        on_rank_0(self.ctx, lambda: self._complete(temporary, final, state, weights, header))
        self._current = final
        return final

    def find(self, step: int = -1) -> Path | None:
        """The checkpoint of `step`, or the newest for -1, which is None if there is none.

        Raises:
            ConfigError: when there is no checkpoint of `step`, or it has no training state; names the steps that have.
        """
        return on_rank_0(self.ctx, lambda: self._find(step))

    def load(self, path: Path, state: TrainState) -> None:
        """Continues from `path`: model, optimizer, scheduler, place in the data, random numbers; sets `state.step`.

        Changed settings that are not the architecture are logged and hold from now on. With another learning rate,
        weight decay, warm-up or number of steps, the new schedule is entered at the place where the old one was left.

        Raises:
            ConfigError: when another architecture, other parameters or another base model were trained, or a file is
                damaged; nothing in the run's folder is changed then.
        """
        rescheduled = on_rank_0(self.ctx, lambda: self._compare(path))
        load_training_state(path / STATE, state, self.ctx, keep_schedule=not rescheduled)
        self._current = path
        if self.ctx.rank == 0:
            ttt = ttt_tensors(find_weights(path), state.model)
            logger.info("Resumed at step %d from %s: %s", state.step, path, ttt)

    def _compare(self, path: Path) -> bool:
        """On rank 0: refuses what cannot be resumed, and logs what has changed; True when the schedule has."""
        saved = open_resumable(path)
        refuse_other_model(saved, self.args, self.lm_config)
        return log_changes(saved, self.args)

    def _find(self, step: int) -> Path | None:
        found = list_checkpoints(self.folder)
        if step == -1 and not found:
            return None
        wanted = max(found) if step == -1 else step
        if wanted in found and is_resumable(found[wanted]):
            return found[wanted]
        others = [str(other) for other, folder in found.items() if is_resumable(folder)]
        there = f"there are {', '.join(others)}, for --resume STEP" if others else "there is none to resume"
        if wanted in found:
            raise ConfigError(
                f"{found[wanted]}: has no training_state/.metadata and cannot be resumed; {there}. To begin a new run "
                "from its weights, set init_from."
            )
        raise ConfigError(f"checkpoint.resume_step={step}: no such checkpoint in {self.folder}; {there}.")

    @contextlib.contextmanager
    def _writing(self, temporary: Path) -> Iterator[None]:
        """Turns write errors into DiskErrors, and removes the unfinished checkpoint."""
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            reason = reason_of(error, self.folder)
            if reason is None:
                raise
            if self.ctx.rank == 0:  # no rank writes any more: torch waits for all before it raises
                shutil.rmtree(temporary, ignore_errors=True)
            newest = list(list_checkpoints(self.folder).values())[-1:]
            rest = f"the last complete checkpoint, {newest[0]}, is intact" if newest else "there is no other checkpoint"
            raise DiskError(
                f"{temporary.with_name(temporary.name.removeprefix('.tmp-'))}: cannot be saved ({reason}); {rest}. "
                "Make room, or lower num_ckpt_keep, and continue with --resume."
            ) from error

    def _prepare(self, temporary: Path) -> None:
        with self._writing(temporary):
            self.folder.mkdir(parents=True, exist_ok=True)
            sync(self.folder.parent)
            for leftover in [folder for folder in self.folder.iterdir() if LEFTOVER.fullmatch(folder.name)]:
                logger.info("Removing what an interrupted save left: %s", leftover)
                shutil.rmtree(leftover)
            (temporary / "consolidated").mkdir(parents=True)

    def _complete(
        self, temporary: Path, final: Path, state: TrainState, weights: dict[str, torch.Tensor], header: dict[str, str]
    ) -> None:
        """On rank 0: writes the other files, gives the checkpoint its name, and deletes those that are too many."""
        with self._writing(temporary):
            self._write_rest(temporary, final, state, weights, header)

    def _write_rest(
        self, temporary: Path, final: Path, state: TrainState, weights: dict[str, torch.Tensor], header: dict[str, str]
    ) -> None:
        step, model = state.step, state.model
        folder = temporary / "consolidated"
        name = ADAPTERS if self.adapters else TRAINED if self.trained_alone else MERGED
        save_file(weights, folder / name, header)
        ttt = ttt_tensors(folder / name, model)
        write_json(folder / "config.json", self._served_config(final / "consolidated" / name))
        write_json(folder / "training_config.json", self._training_config(step))
        write_checksums(folder, [name, "training_config.json"])  # not config.json, which moving a run rewrites
        write_state_checksums(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        self._abandon_from(step)
        temporary.rename(final)
        sync(self.folder)
        logger.info("Saved %s: %s", final, ttt)
        self.prune()

    def _abandon_from(self, step: int) -> None:
        """Renames checkpoints of `step` and later: the run went back to before them."""
        for newer in [folder for other, folder in list_checkpoints(self.folder).items() if other >= step]:
            aside = self.folder / f"abandoned-{newer.name}"
            number = 2
            while aside.exists():
                aside, number = self.folder / f"abandoned-{newer.name}-{number}", number + 1
            newer.rename(aside)
            relocate_adapters(aside)
            logger.warning("%s was trained before the run went back; kept as %s, delete it at will.", newer, aside)

    def prune(self) -> None:
        """On rank 0: removes the checkpoints beyond `num_ckpt_keep`, but not the best one with `keep_best`."""
        keep = self.args.num_ckpt_keep
        best = read_best(self.folder) if self.args.keep_best else None
        complete = [folder for folder in list_checkpoints(self.folder).values() if is_resumable(folder)]
        for folder in complete[: -keep if keep else 0]:
            if best is not None and folder.name == checkpoint_name(best.step):
                continue
            going = self.folder / f".old-{folder.name}"
            folder.rename(going)
            shutil.rmtree(going)

    def _served_config(self, file: Path) -> dict[str, Any]:
        """`config.json` beside `file`, the weights.

        `lora: false` for a merged model: with `true` moshi would add random adapters. `moshi.run_inference` has no
        option for adapters, so the config of adapters names their file, by its absolute path.
        """
        left_out = (*moshi_patch.LORA_KEYS, "lora_name")
        config = {key: value for key, value in self.lm_config.items() if key not in left_out}
        if not self.adapters:
            named = {} if self.trained_alone else {"moshi_name": file.name}
            return config | {"lora": False} | named
        lora = self.args.lora
        settings = {"lora": True, "lora_rank": lora.rank, "lora_scaling": lora.scaling}
        return config | settings | {"lora_name": f"file://{file.resolve()}"}

    def _training_config(self, step: int) -> dict[str, Any]:
        settings = {"training": to_dict(self.args), "lm_config": self.lm_config}
        place = {"working_directory": os.getcwd()}  # that relative paths of the settings begin at
        return {**settings, **place, "step": step, "world_size": self.ctx.world_size, "versions": versions()}
