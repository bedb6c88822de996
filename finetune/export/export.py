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
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from safetensors.torch import save_file

from ..checkpoint.saved import (
    SavedCheckpoint,
    find_adapter_base,
    find_files,
    load_language_model,
    model_paths,
    open_checkpoint,
)
from ..checkpoint.verify import contradictions, stored_dtype
from ..checkpoint.weights import ADAPTERS, MERGED, collect_weights
from ..common.checksums import CHECKSUMS, changed_files, read_checksums, write_checksums
from ..common.distributed import Context
from ..common.errors import ConfigError
from ..common.files import read_json, write_json
from ..settings.schema import MoshiPaths
from .model_card import model_card

logger = logging.getLogger(__name__)

FILES = {"mimi_name": "mimi", "mimi_config_name": "mimi_config", "tokenizer_name": "tokenizer", "moshi_name": "model"}
"""Keys of config.json that name a file, and what it is called in the folder; it keeps its suffix."""

DEFAULT_NAMES = {
    "mimi_name": loaders.MIMI_NAME,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
    "moshi_name": loaders.MOSHI_NAME,
}
HUB = "hf://"
PRIVATE_SETTINGS = ("run_dir", "data", "moshi_paths", "wandb", "init_from", "checkpoint", "overwrite_run_dir")
"""Settings of a training that mean nothing elsewhere, or that name what is nobody else's business."""


@dataclass(frozen=True)
class Options:
    """What to export.

    Args:
        merge: adapters are merged into the base model.
        with_base: the base model of adapters goes into the folder too.
        base: where the base model is, as `saved.model_paths` takes it; None: as it was trained.
        name: of the model card; None: the folder's.
        results: an `eval.json` for the model card; None: that of this checkpoint, if there is one.
    """

    merge: bool = False
    with_base: bool = False
    base: str | None = None
    name: str | None = None
    results: Path | None = None


def export(checkpoint: str | Path, out: str | Path, options: Options) -> Path:
    """Makes the folder `out`, whole or not at all.

    Raises:
        ConfigError: when `out` exists, the checkpoint is broken, or what belongs to it cannot be found; no file is
            left then.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"OUT={str(out)!r}: exists, and nothing is overwritten; choose another name.")
    saved = open_checkpoint(checkpoint, "CHECKPOINT")
    _refuse_broken(saved)
    results = _find_results(saved, options.results)
    paths = model_paths(saved, options.base)
    adapters = saved.adapters and not options.merge
    sources = _sources(saved, paths, ["moshi_name"] if adapters else [])
    if adapters and isinstance(sources["moshi_name"], Path) and not options.with_base:
        raise ConfigError(
            f"CHECKPOINT={str(checkpoint)!r}: holds adapters, and their base model {sources['moshi_name']} is a file "
            "of this machine. Add --with-base to copy it, or --merge to export one model."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{out.name}-", dir=out.parent))
    try:
        names = {key: _place(folder, key, source, options) for key, source in sources.items()}
        names |= _write_weights(folder, saved, paths, adapters)
        write_json(folder / "config.json", _config(saved, names, adapters))
        if saved.training is not None:
            write_json(folder / "training_config.json", _public(saved.training))
        write_checksums(folder, sorted({path.name for path in folder.iterdir()} - {"config.json"}))
        of = {"adapters": adapters, "base": _hub_of(paths), "results": results}
        (folder / "README.md").write_text(model_card(options.name or out.name, saved, **of))
        folder.chmod(0o755)  # a temporary folder is nobody else's
        folder.rename(out)
    except BaseException:  # also when it is interrupted
        shutil.rmtree(folder)
        raise
    return out


def _refuse_broken(saved: SavedCheckpoint) -> None:
    recorded = read_checksums(saved.folder)
    if recorded is None:
        logger.warning("%s: no %s; a flipped bit in its weights would not be seen.", saved.folder, CHECKSUMS)
    changed = changed_files(saved.folder, recorded or {})
    problems = [f"{name} is not what was saved (SHA-256)." for name in changed] or contradictions(saved)
    if problems:
        raise ConfigError(
            f"CHECKPOINT={str(saved.folder)!r}: is not exported, as it is broken: {' '.join(problems)} "
            "`python -m finetune.doctor` says more."
        )


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


def _sources(saved: SavedCheckpoint, paths: MoshiPaths, more: list[str]) -> dict[str, str | Path]:
    """For each key of `FILES` that is needed: a file of this machine, or `hf://owner/name/file`.

    Args:
        more: keys that are needed besides those of Mimi and of the tokenizer.
    """
    info = find_files(saved, paths, weights=False)
    given = {"moshi_name": paths.moshi_path, "mimi_name": paths.mimi_path, "tokenizer_name": paths.tokenizer_path}
    sources = {}
    for key in ("mimi_name", "mimi_config_name", "tokenizer_name", *more):
        named = (info.raw_config or {}).get(key, DEFAULT_NAMES.get(key))
        if given.get(key) is not None:
            sources[key] = given[key] if given[key].startswith(HUB) else loaders.hf_get(given[key])
        elif named is not None:
            sources[key] = _in_repository(named, paths)
    for key, source in sources.items():
        if isinstance(source, Path) and not source.is_file():
            raise ConfigError(f"moshi_paths: {source}, the {key} of this model, is not there; name it with --base.")
    return sources


def _in_repository(name: str, paths: MoshiPaths) -> str | Path:
    """What `name` in a config.json of `paths` stands for."""
    if name.startswith(HUB):
        return name
    if name.startswith("file://"):
        return loaders.hf_get(name)
    if paths.hf_repo_id is None:
        return loaders.hf_get(paths.config_path).parent / name
    folder = Path(paths.hf_repo_id)
    return folder / name if folder.is_dir() else f"{HUB}{paths.hf_repo_id}/{name}"


def _place(folder: Path, key: str, source: str | Path, options: Options) -> str:
    """The name of a file for config.json, after it was copied into `folder` if it has to be there."""
    wanted = key == "mimi_config_name" or (key == "moshi_name" and options.with_base)
    if isinstance(source, str) and not wanted:
        return source
    file = loaders.hf_get(source)
    name = FILES[key] + file.suffix
    shutil.copyfile(file, folder / name)
    return name


def _write_weights(folder: Path, saved: SavedCheckpoint, paths: MoshiPaths, adapters: bool) -> dict[str, str]:
    """Writes the weights; the keys of config.json that name them."""
    if adapters:
        shutil.copyfile(saved.weights, folder / ADAPTERS)
        return {"lora_name": ADAPTERS}
    if saved.adapters:
        base, dtype = find_adapter_base(saved, paths).moshi_weights, stored_dtype(saved)
        model = load_language_model(saved, base, torch.device("cpu"), dtype)
        weights = collect_weights(model, Context(0, 1, 0, torch.device("cpu")), adapters=False, dtype=dtype)
        save_file(weights, folder / MERGED, {"format": "pt"})
    else:
        shutil.copyfile(saved.weights, folder / MERGED)
    return {"moshi_name": MERGED}


def _config(saved: SavedCheckpoint, names: dict[str, str], adapters: bool) -> dict[str, Any]:
    config = {key: value for key, value in saved.config.items() if key not in (*FILES, "lora_name")}
    if not adapters:  # with `lora: true` moshi would add random ones
        config = {key: value for key, value in config.items() if key not in ("lora_rank", "lora_scaling")}
        config["lora"] = False
    return config | names


def _public(training: dict[str, Any]) -> dict[str, Any]:
    """`training_config.json` without what is of the machine."""
    settings = {key: value for key, value in training["training"].items() if key not in PRIVATE_SETTINGS}
    trained = {key: value for key, value in training["lm_config"].items() if key not in (*FILES, "lora_name")}
    return training | {"training": settings, "lm_config": trained}


def _hub_of(paths: MoshiPaths) -> str | None:
    """The Hub repository of the base model's weights, `owner/name`; None when they are a file."""
    weights = paths.moshi_path or _in_repository(DEFAULT_NAMES["moshi_name"], paths)
    if not str(weights).startswith(HUB):
        return None
    return "/".join(str(weights).removeprefix(HUB).split("/")[:2])
