"""`python -m finetune.export CHECKPOINT OUT`: a folder that is served by its path, and uploaded to the Hub as it is.

    OUT/consolidated.safetensors    the whole model; or lora.safetensors, adapters
    OUT/config.json                 names the other files, in OUT or in a Hub repository (`hf://owner/name/file`)
    OUT/mimi.safetensors, ...       Mimi and the tokenizer, unless they are on the Hub
    OUT/training_config.json        how it was trained, without the paths of the machine
    OUT/README.md                   the model card
    OUT/SHA256SUMS                  of all files but config.json and README.md, which may be edited

It needs neither the run nor the machine it was trained on. The weights are one file, as stock moshi loads one: there
is no index.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import moshi_patch

from ..checkpoint.base_fingerprint import ALONE
from ..checkpoint.best import best_beside, best_checkpoint
from ..checkpoint.folders import ADAPTERS, MERGED
from ..checkpoint.saved import SavedCheckpoint, find_adapter_base, load_language_model, model_paths, open_checkpoint
from ..checkpoint.verify import refuse_broken
from ..checkpoint.weights import collect_weights
from ..common.checksums import read_checksums, write_checksums
from ..common.disk import reading, reason_of
from ..common.errors import ConfigError, DiskError
from ..common.files import read_json, whole_folder, write_json
from ..settings.commands import ExportArgs
from ..settings.schema import MoshiPaths
from .model_card import model_card
from .sources import find_sources, hub_of, place

logger = logging.getLogger(__name__)

PRIVATE_SETTINGS = ("run_dir", "data", "moshi_paths", "wandb", "init_from", "checkpoint", "overwrite_run_dir")
"""Settings of a training that mean nothing elsewhere, or that name what is nobody else's business."""


def export(args: ExportArgs) -> Path:
    """Makes the folder `args.out`, whole or not at all, and returns it.

    Raises:
        ConfigError: when `out` exists, the checkpoint is broken, or what belongs to it cannot be found; no file is
            left then.
    """
    checkpoint, out = args.checkpoint, Path(args.out)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"OUT={str(out)!r}: exists, and nothing is overwritten; choose another name.")
    saved = open_checkpoint(best_checkpoint(Path(checkpoint)) if args.best else checkpoint, "CHECKPOINT")
    _tell_of_the_best(saved)
    refuse_broken(saved, "CHECKPOINT")
    results = _find_results(saved, None if args.eval is None else Path(args.eval))
    paths = model_paths(saved, args.base)
    adapters = saved.adapters and not args.merge
    sources = find_sources(saved, paths, base=adapters)
    if adapters and isinstance(sources["moshi_name"], Path) and not args.with_base:
        raise ConfigError(
            f"CHECKPOINT={str(checkpoint)!r}: holds adapters, and their base model {sources['moshi_name']} is a file "
            "of this machine. Add --with-base to copy it, or --merge to export one model."
        )
    try:
        with whole_folder(out) as folder:
            names = {key: place(folder, key, source, with_base=args.with_base) for key, source in sources.items()}
            names |= _write_weights(folder, saved, paths, adapters)
            write_json(folder / "config.json", _config(saved, names, adapters))
            if saved.training is not None:
                write_json(folder / "training_config.json", _public(saved.training))
            write_checksums(folder, sorted({path.name for path in folder.iterdir()} - {"config.json"}))
            with reading(
                "eval: these results are not those of an evaluation", "Evaluate again, or move eval.json away."
            ):
                card = model_card(args.name or out.name, saved, adapters=adapters, base=hub_of(paths), results=results)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = reason_of(error, out.parent)
        raise DiskError(f"{out}: cannot be made ({reason}); nothing is left of it.") from error
    return out


def _tell_of_the_best(saved: SavedCheckpoint) -> None:
    """Says it when another checkpoint of the same run has a lower held-out loss."""
    found = best_beside(saved.folder.parent)
    if found is None or found[0].step == saved.step:
        return
    best, folder = found
    remedy = "it was deleted" if folder is None else f"export it with --best, or by its name, {folder}"
    logger.warning(
        "Step %d of this run has the lowest held-out loss, %.4f, and this is step %s: %s.",
        best.step, best.loss, saved.step, remedy,
    )  # fmt: skip


def _find_results(saved: SavedCheckpoint, given: Path | None) -> dict[str, Any] | None:
    """The `eval.json` that was given, or that an evaluation of this checkpoint wrote where it does by default."""
    checkpoint = saved.folder.resolve().parent
    path = given or checkpoint.parent.parent / "eval" / checkpoint.name / "eval.json"
    if given is None and (checkpoint.parent.name != "checkpoints" or not path.is_file()):
        return None
    if not path.is_file():
        raise ConfigError(f"eval={str(given)!r}: no such file.")
    results, step = read_json(path), (saved.training or {}).get("step")
    if None not in (step, results.get("step")) and results["step"] != step:
        raise ConfigError(
            f"eval={str(path)!r}: was measured at step {results['step']}, and this checkpoint is of {step}."
        )
    recorded = (read_checksums(saved.folder) or {}).get(saved.weights.name)
    if None not in (recorded, results.get("sha256")) and results["sha256"] != recorded:
        raise ConfigError(
            f"eval={str(path)!r}: was measured with other weights (SHA-256), as of a run that went back to an earlier "
            "step. Evaluate this checkpoint, or move that file away."
        )
    return results


def _write_weights(folder: Path, saved: SavedCheckpoint, paths: MoshiPaths, adapters: bool) -> dict[str, str]:
    """Writes the weights; the keys of config.json that name them."""
    if adapters:
        shutil.copyfile(saved.weights, folder / ADAPTERS)
        return {"lora_name": ADAPTERS}
    if saved.needs_base:
        base, dtype = find_adapter_base(saved, paths).moshi_weights, saved.dtype
        with reading(f"{base}: what was trained in {saved.folder} cannot be merged into it"):
            model = load_language_model(saved, base, torch.device("cpu"), dtype)
        weights = collect_weights(model, ALONE, adapters=False, dtype=dtype)
        save_file(weights, folder / MERGED, {"format": "pt"})
    else:
        shutil.copyfile(saved.weights, folder / MERGED)
    return {"moshi_name": MERGED}


def _config(saved: SavedCheckpoint, names: dict[str, str], adapters: bool) -> dict[str, Any]:
    config = {key: value for key, value in saved.config.items() if key not in moshi_patch.FILE_KEYS}
    if not adapters:  # with `lora: true` moshi would add random ones
        config = {key: value for key, value in config.items() if key not in moshi_patch.LORA_KEYS} | {"lora": False}
    return config | names


def _public(training: dict[str, Any]) -> dict[str, Any]:
    """`training_config.json` without what is of the machine."""
    settings = {key: value for key, value in training["training"].items() if key not in PRIVATE_SETTINGS}
    trained = {key: value for key, value in training.get("lm_config", {}).items() if key not in moshi_patch.FILE_KEYS}
    rest = {key: value for key, value in training.items() if key != "working_directory"}
    return rest | {"training": settings, "lm_config": trained}
