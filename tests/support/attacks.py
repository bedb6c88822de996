"""Ways to break what a training or an export left on the disk, and the programs that must notice.

`python -m tests.support.attack_targets` counts what each program does with them.

An attack is a name, what it is done to (`full` or `adapters`, the checkpoint of a run; `export`, the exported full
model; `base`, the base model of the adapters), a function of that folder, and the programs that have to refuse it:
doctor, export, eValuate, resume, init_from, by the letters of `PROGRAMS`.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.breakages import (
    as_folder,
    as_pipe,
    bytes_of,
    exploit_index,
    exploit_value,
    fill,
    flip,
    gone,
    header,
    index_elsewhere,
    link,
    moved_offsets,
    of_another_step,
    raw,
    setting,
    tensors,
)

PROGRAMS = {"d": "doctor", "e": "export", "v": "evaluate", "r": "resume", "i": "init_from"}
W_TARGET = "transformer.layers.1.gating.target_generator.W_target.weight"
WEIGHTS = {"full": "consolidated.safetensors", "adapters": "lora.safetensors", "export": "consolidated.safetensors"}
SECRET = "0123456789 a secret key"


@dataclass(frozen=True)
class Attack:
    """See the module."""

    name: str
    target: str
    do: Callable[[Path], None]
    refused_by: str


NO_JSON = {
    "empty": b"",
    "cut off": b'{"dim": ',
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "200,000 brackets": b"[" * 200_000,
    "200,000 objects": b'{"a":' * 200_000,
    "70 levels": b'{"a":' * 70 + b"1" + b"}" * 70,
    "5,000 digits": b'{"dim": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"dim": "\xff\xfe"}',
    "zeros": bytes(1000),
}
CONFIG = {
    "moshi_name": [5, [], {}, "../secret.key", "/etc/hostname", "a\0b", "x" * 5000, "hf://x", "sub/../../secret.key"],
    "mimi_name": [5, "../secret.key"],
    "mimi_config_name": [5, {}, "../secret.json"],
    "tokenizer_name": [5, "../secret.key", "/etc/hostname"],
    "lora": ["yes", 1],
    "num_layers": [10**9, 0, -1, "2", 2.5, True, 3, [2]],
    "dim": [10**9, 0, "8", 7, 16],
    "num_heads": [10**9, 0, 3, "x"],
    "n_q": [10**9, -1, "4", 3],
    "dep_q": [10**9, 1, {}],
    "card": [10**9, 0, 63],
    "text_card": [10**12, "x", 39],
    "context": [-1, "x", 10**30],
    "hidden_scale": [1e308, 0, "x", 3],
    "delays": ["x", [10**9], [0], {}, [0, "1", 0, 0, 0]],
    "depformer_num_layers": [10**9, 2],
    "depformer_dim_feedforward": [10**15, "x", []],
    "depformer_weights_per_step_schedule": [[0, 10**9], "x"],
    "ttt_layers": ["nonsense", [99], [0], 10**9, {}],
    "ttt_chunk_size": [0, "8", 1.5, 10**40],
    "ttt_learning_rate": [-1, "x"],
    "gating": [5, "nonsense"],
    "conditioners": [5, {"a": 5}, {"a": {"type": "nonsense"}}],
    "nobody_knows_this": [1],
}
"""Values of config.json that are no model's, or not this one's."""

TRAINING = {
    "training": [5, []],
    "lm_config": [5, {}],
    "versions": ["x"],
    "step": ["2", 7],
    "training.batch_size": ["x", {}],
    "training.optim": [5],
    "training.moshi_paths": ["x"],
    "training.ttt.chunk_size": ["x"],
}


def weight_attacks(target: str, name: str, others: str) -> list[Attack]:
    file = WEIGHTS[target]
    ways = {
        "flipped bit": bytes_of(file, flip),
        "flipped bit in the header": bytes_of(file, lambda content: flip(content, 0.001)),
        "truncated": bytes_of(file, lambda content: content[:-100], sums=False),
        "header alone": bytes_of(file, lambda content: content[:100], sums=False),
        "empty": bytes_of(file, lambda content: b"", sums=False),
        "longer": bytes_of(file, lambda content: content + b"more", sums=False),
        "a text": bytes_of(file, lambda content: b"not a tensor in sight", sums=False),
        "a pickle": bytes_of(file, lambda content: pickle.dumps({"a": 1}), sums=False),
        "endless header": bytes_of(file, lambda content: b"\xff" * 8 + content[8:], sums=False),
        "brackets in the header": bytes_of(file, header(lambda _: b"[" * 100_000), sums=False),
        "offsets beyond the end": bytes_of(file, header(moved_offsets), sums=False),
        "NaN": tensors(file, fill(name, float("nan"))),
        "infinity": tensors(file, fill(name, float("inf"))),
        "1e30": tensors(file, fill(name, 1e30)),
        "a tensor gone": tensors(file, lambda content: content.pop(name)),
        "a tensor more": tensors(file, lambda content: content.update(more=torch.ones(1))),
        "another shape": tensors(file, lambda content: content.update({name: torch.ones(3, 5)})),
        "another dtype": tensors(file, lambda content: content.update({name: content[name].half()})),
        "whole numbers": tensors(file, lambda content: content.update({name: content[name].int()})),
    }
    return [Attack(f"{target}: weights: {what}", target, way, others) for what, way in ways.items()]


STATE = "../training_state/"
STATE_ATTACKS = [
    ("a flipped bit in the values", bytes_of(f"{STATE}__0_0.distcp", flip), "dr"),
    ("values truncated", bytes_of(f"{STATE}__0_0.distcp", lambda content: content[:-50]), "dr"),
    ("values truncated, no sums", bytes_of(f"{STATE}__0_0.distcp", lambda content: content[:-50], sums=False), "dr"),
    ("values empty", bytes_of(f"{STATE}__0_0.distcp", lambda content: b"", sums=False), "dr"),
    ("values gone", gone(f"{STATE}__0_0.distcp"), "dr"),
    ("a flipped bit in the index", bytes_of(f"{STATE}.metadata", flip), "dr"),
    ("index truncated", bytes_of(f"{STATE}.metadata", lambda content: content[:500], sums=False), "dr"),
    ("index empty", bytes_of(f"{STATE}.metadata", lambda content: b"", sums=False), "dr"),
    ("index a text", bytes_of(f"{STATE}.metadata", lambda content: b"no pickle", sums=False), "dr"),
    ("index gone", gone(f"{STATE}.metadata"), "r"),
    ("index runs code", lambda folder: exploit_index(folder / STATE), "dr"),
    ("a value runs code", lambda folder: exploit_value(folder / STATE), "r"),
    ("index names other folders", lambda folder: index_elsewhere(folder / STATE), "dr"),
    ("sums are garbage", raw("../SHA256SUMS", b"garbage"), "dr"),
    ("sums of nothing", raw("../SHA256SUMS", b""), "dr"),
    ("sums of a file elsewhere", raw("../SHA256SUMS", b"0" * 64 + b"  ../../secret.key\n"), "dr"),
    ("the name of another step", lambda folder: of_another_step(folder.parent), "devri"),
]


EXPORT_ATTACKS = [
    ("Mimi: a flipped bit", bytes_of("mimi.safetensors", flip), "devi"),
    ("Mimi: truncated", bytes_of("mimi.safetensors", lambda content: content[:-100], sums=False), "devi"),
    (
        "Mimi: NaN",
        tensors("mimi.safetensors", lambda content: next(iter(content.values())).fill_(float("nan"))),
        "devi",
    ),
    ("Mimi: a tensor gone", tensors("mimi.safetensors", lambda content: content.popitem()), "devi"),
    ("Mimi: gone", gone("mimi.safetensors"), "devi"),
    ("Mimi: a link to a secret", link("mimi.safetensors"), "devi"),
    ("Mimi's settings: 1e9 layers", setting("mimi_config.json", "transformer.num_layers", 10**9), "devi"),
    ("Mimi's settings: a text for an object", setting("mimi_config.json", "seanet", "x"), "devi"),
    ("Mimi's settings: cut off", raw("mimi_config.json", b"{"), "devi"),
    ("Mimi's settings: gone", gone("mimi_config.json"), "devi"),
    ("tokenizer: a flipped bit", bytes_of("tokenizer.model", flip), "devi"),
    ("tokenizer: truncated", bytes_of("tokenizer.model", lambda content: content[:200], sums=False), "dev"),
    ("tokenizer: a link to a secret", link("tokenizer.model"), "devi"),
    ("tokenizer: a secret", raw("tokenizer.model", SECRET.encode()), "dev"),
    ("tokenizer_name: a secret", setting("config.json", "tokenizer_name", "../secret.key"), "devi"),
    ("sums: garbage", raw("SHA256SUMS", b"\0\1garbage"), "devi"),
]


def _another_shape(content: dict[str, torch.Tensor]) -> None:
    content["text_emb.weight"] = torch.ones(3, 5)


BASE_ATTACKS = [
    ("NaN", tensors("model.safetensors", fill("text_emb.weight", float("nan"))), "dev"),
    ("truncated", bytes_of("model.safetensors", lambda content: content[:-100]), "dev"),
    ("a tensor gone", tensors("model.safetensors", lambda content: content.pop("text_emb.weight")), "dev"),
    ("another shape", tensors("model.safetensors", _another_shape), "dev"),
    ("not a model", tensors("model.safetensors", lambda content: content.clear()), "dev"),
    ("1e9 layers", setting("config.json", "num_layers", 10**9), "ev"),
    ("a name elsewhere", setting("config.json", "moshi_name", "../secret.key"), "dev"),
    ("tokenizer elsewhere", setting("config.json", "tokenizer_name", "../secret.key"), "dev"),
]


def all_attacks() -> list[Attack]:
    """Every attack once, in a fixed order."""
    found = [
        Attack(f"config.json: {what}", "full", raw("config.json", text), "devri") for what, text in NO_JSON.items()
    ]
    found += [Attack("config.json: a folder", "full", as_folder("config.json"), "devri")]
    found += [Attack("config.json: a pipe", "full", as_pipe("config.json"), "devri")]
    found += [Attack("config.json: gone", "full", gone("config.json"), "devri")]
    for key, values in CONFIG.items():
        found += [
            Attack(f"{key}={repr(value)[:40]}", "full", setting("config.json", key, value), "devri") for value in values
        ]
    names = ("empty", "cut off", "a list", "200,000 brackets", "no UTF-8")
    found += [
        Attack(f"training_config.json: {name}", "full", raw("training_config.json", NO_JSON[name]), "devri")
        for name in names
    ]
    for key, values in TRAINING.items():
        found += [
            Attack(f"{key}={value!r}", "full", setting("training_config.json", key, value), "devri") for value in values
        ]
    found += weight_attacks("full", W_TARGET, "devri")
    found += weight_attacks("adapters", "text_linear.lora_A.weight", "devri")
    found += [Attack(f"training state: {name}", "full", do, who) for name, do, who in STATE_ATTACKS]
    found += [Attack(f"export: {name}", "export", do, who) for name, do, who in EXPORT_ATTACKS]
    found += [Attack(f"base: {name}", "base", do, who) for name, do, who in BASE_ATTACKS]
    return found
