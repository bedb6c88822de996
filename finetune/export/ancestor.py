"""`python -m finetune.export --import-ancestor SOURCE --out DIR`: a checkpoint of an ancestor becomes one of ours.

Ancestors are older hybrids of Moshi and TTT-MLP. What is written is `ttt_kind="mlp"`: the same tensors, bit for bit,
under this project's names, and a config.json that says what they are. It is a beginning for training, not the same
function: what ancestors computed differs between them, and from this project.

    DIR/consolidated.safetensors    the whole model; or lora.safetensors, adapters
    DIR/config.json                 the ancestor's, with ttt_*
    DIR/SHA256SUMS
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import moshi_patch

from ..checkpoint.contradictions import contradictions
from ..checkpoint.folders import ADAPTERS, MERGED, find_weights
from ..checkpoint.saved import open_checkpoint
from ..common.checksums import write_checksums
from ..common.disk import reason_of
from ..common.errors import ConfigError, DiskError
from ..common.files import whole_folder, write_json
from ..model.conditions import ALWAYS_FLOAT32
from ..model.tensor_file import DTYPES, Stored, broken_values, main_dtype, measure, read_header, some
from ..settings.commands import ImportArgs
from .ancestor_names import TENSORS, AncestorNames, read_names, tensor_shapes
from .ancestor_settings import AncestorSettings, read_settings

KEY = "import_ancestor"
DIFFERENT_FUNCTION = (
    "This is a start, not the same function: ancestors differ from this project in the target of the inner loss, in "
    "the LayerNorms' epsilon, in what a step sees of its own mini-batch, and the last one never applied post_norm and "
    "wo. Evaluate it, and train on from it, before you rely on it."
)


def import_ancestor(args: ImportArgs) -> list[str]:
    """Makes the folder `args.out`, whole or not at all; returns what a user must know of it, a line each.

    Raises:
        ConfigError: when `out` exists, or anything about the source is not as an ancestor leaves it; nothing is left.
    """
    out = Path(args.out)
    if not args.out:
        raise ConfigError(f"out={args.out!r}: must be the folder to make.")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={args.out!r}: exists, and nothing is overwritten; choose another name.")
    weights = find_weights(Path(args.source), KEY)
    config = _read_config(weights)
    header = read_header(weights)
    names = read_names(header)
    problems = names.problems
    if not names.layers and not problems:
        problems = ["holds no TTT layer of an ancestor."]
    _refuse(weights, problems or _problems(config, header, names))
    settings = read_settings(weights, args.config, names.layers, config["num_layers"])
    adapters = _is_adapters(weights, config, names)
    _refuse(weights, broken_values(dict(measure(weights))))
    try:
        with whole_folder(out) as folder:
            _write(folder, weights, names, ADAPTERS if adapters else MERGED)
            write_json(folder / "config.json", _config(config, settings, adapters))
            write_checksums(folder, [ADAPTERS if adapters else MERGED])
            _refuse(weights, contradictions(open_checkpoint(folder, KEY)))
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{out}: cannot be made ({reason_of(error, out.parent)}); nothing is left of it.") from error
    return _report(names, settings, adapters)


def _refuse(weights: Path, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"{KEY}={str(weights)!r}: {some([one.rstrip('.') for one in problems])}.")


def _read_config(weights: Path) -> dict[str, Any]:
    """The config.json beside the weights: of a model, naming no file elsewhere."""
    path = weights.with_name("config.json")
    if not path.is_file():
        raise ConfigError(f"{KEY}={str(weights)!r}: no config.json beside it; it says what the weights are.")
    try:
        config = moshi_patch.read_model_config(path)
        for name in filter(None, map(config.get, moshi_patch.FILE_KEYS)):
            with contextlib.suppress(LocalEntryNotFoundError):  # the files of its base model lie elsewhere
                moshi_patch.named_file(weights.parent, weights.parent, name)
    except (OSError, ValueError, moshi_patch.RepositoryError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{KEY}={str(path)!r}: {reason}") from error
    for key in ("dim", "num_heads", "num_layers"):
        if config.get(key) is None:
            raise ConfigError(f"{KEY}={str(path)!r}: {key} is missing; it must be that of the model.")
    if config["dim"] % config["num_heads"]:
        raise ConfigError(
            f"{KEY}={str(path)!r}: num_heads={config['num_heads']}: must divide dim={config['dim']}; every head has "
            "its own inner network."
        )
    return config


def _problems(config: Mapping[str, Any], header: Mapping[str, Stored], names: AncestorNames) -> list[str]:
    """What is wrong with layers, shapes and dtypes, one sentence each."""
    found, shapes = [], tensor_shapes(config["dim"], config["num_heads"])
    outside = [layer for layer in names.layers if layer >= config["num_layers"]]
    if outside:
        found.append(f"num_layers={config['num_layers']} in config.json, and there is a TTT layer {outside[0]}.")
    for layer in names.layers:
        for name, ours in names.ttt(layer).items():
            for source in names.sources[ours]:
                if header[source].shape != shapes[name]:
                    found.append(f"{source} is {list(header[source].shape)}, not {list(shapes[name])}.")
    usual = main_dtype(header)
    if usual not in DTYPES.values():
        found.append(f"its tensors are {usual}; must be one of {', '.join(DTYPES.values())}.")
    other = [
        f"{name} is {one.dtype}, not {usual}."
        for name, one in header.items()
        if one.dtype != usual and not (name.startswith(ALWAYS_FLOAT32) and one.dtype == "F32")
    ]
    return found + other


def _is_adapters(weights: Path, config: Mapping[str, Any], names: AncestorNames) -> bool:
    """Whether the file holds adapters (LoRA), and not a whole model."""
    lora = [name for name in names.sources if name.endswith((".lora_A.weight", ".lora_B.weight"))]
    frozen = [name for name in names.sources if ".frozen_W." in name]
    whole = "text_emb.weight" in names.sources
    if frozen or (lora and whole):
        _refuse(weights, [f"holds a whole model with adapters beside it ({some(frozen or lora)}); merge them first."])
    if not lora and not whole:
        _refuse(weights, ["holds neither adapters nor a whole model (no text_emb.weight)."])
    if lora and not config.get("lora"):
        _refuse(weights, [f"lora={config.get('lora', False)!r} in config.json, and the file holds adapters."])
    return bool(lora)


def _config(config: Mapping[str, Any], settings: AncestorSettings, adapters: bool) -> dict[str, Any]:
    """The ancestor's config.json for what is written."""
    kept = {key: value for key, value in config.items() if key != "ttt" and not key.startswith("ttt_")}
    kept.pop("lora_name", None)  # a path on the ancestor's machine
    if not adapters:  # with `lora: true` moshi would add random ones
        kept = {key: value for key, value in kept.items() if key not in moshi_patch.LORA_KEYS} | {"lora": False}
    return kept | settings.kept.to_kwargs()


def _write(folder: Path, weights: Path, names: AncestorNames, name: str) -> None:
    """Writes each tensor once, by its name here.

    Raises:
        ConfigError: when a tensor that was registered twice is not the same twice.
    """
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(weights, framework="pt") as file:
        for ours, sources in names.sources.items():
            first, *others = (file.get_tensor(source) for source in sources)
            if not all(torch.equal(first, other) for other in others):
                _refuse(weights, [f"{' and '.join(sources)} are the same tensor registered twice, and differ."])
            tensors[ours] = first
    save_file(tensors, folder / name, {"format": "pt"})


def _report(names: AncestorNames, settings: AncestorSettings, adapters: bool) -> list[str]:
    count, kept = len(names.layers), settings.kept
    tensors, dropped = count * len(TENSORS), len(names.dropped)
    lines = [
        f"{count} TTT layers ({', '.join(map(str, names.layers))}) in the layout {names.layouts[0]}: "
        f"{tensors + dropped} tensors, of which {tensors} are kept ({len(TENSORS)} a layer) and {dropped} dropped: "
        "backward_ssm_gating.gating_alpha, which nothing calls.",
        f"{len(names.twice)} stock tensors stood there twice, equal; each is kept once.",
        f"Settings, from {settings.source}: mini_batch_size {kept.mini_batch_size}, base_lr {kept.base_lr}, "
        f"initial_gating_alpha {kept.initial_gating_alpha}.",
    ]
    if settings.left_out:
        lines.append(f"Not carried over: {', '.join(settings.left_out)}; they change nothing that is kept.")
    lines += [settings.about_states, DIFFERENT_FUNCTION]
    if adapters:
        lines.append("These are adapters: give their base model with --base.")
    return lines
