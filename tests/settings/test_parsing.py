"""The training settings: moshi-finetune's YAML loads as it is, and nothing wrong gets as far as loading a model."""

import json

import pytest

from finetune.common.errors import ConfigError
from finetune.settings.command_line import load_args, parse_command_line
from finetune.settings.record import from_dict, to_dict
from finetune.settings.schema import CheckpointArgs, TrainArgs, TTTArgs
from finetune.settings.validation import unusual_settings, validate
from moshi_patch import TTTConfig

MOSHI_FINETUNE_EXAMPLE = """
# data
data:
  eval_data: '' # Optional Fill
  shuffle: true
  train_data: 'train.jsonl' # Fill

# model
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"

full_finetuning: false # Activate lora.enable if partial finetuning
lora:
  enable: true # Set to False if full_finetuning is True
  rank: 128
  scaling: 2.
  ft_embed: false # Optional, set to True if you want to finetune the embedding layer

first_codebook_weight_multiplier: 100.
text_padding_weight: .5

# optim
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true # Activate checkpointing of layers
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05

# other
seed: 0
log_freq: 1
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 100

save_adapters: true # Must be False if full_finetuning is True

run_dir: "run" # Fill
overwrite_run_dir: false
"""

TTT_SECTION = """
ttt:
  enabled: true
  layers: 1,5,10
  chunk_size: 128
  optim_lr: 1e-4
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder, made the current one, with what the settings refer to."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl", "weights.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "run.yaml").write_text(MOSHI_FINETUNE_EXAMPLE + TTT_SECTION)
    return tmp_path


def test_the_moshi_finetune_example_loads_unchanged_with_a_ttt_section(files):
    args = load_args(files / "run.yaml")
    validate(args)
    assert unusual_settings(args) == []
    assert (args.optim.lr, args.lora.scaling, args.duration_sec, args.batch_size) == (2e-6, 2.0, 100.0, 16)
    assert (args.max_norm, args.num_ckpt_keep, args.param_dtype) == (1.0, 3, "bfloat16")
    assert args.ttt == TTTArgs(enabled=True, layers="1,5,10", chunk_size=128, optim_lr=1e-4)


def test_defaults_are_those_of_the_format_page():
    args = TrainArgs()
    assert to_dict(args) == {
        "data": {"train_data": "", "eval_data": "", "shuffle": False},
        "run_dir": "",
        "moshi_paths": {"hf_repo_id": "kyutai/moshiko-pytorch-bf16"}
        | dict.fromkeys(["mimi_path", "moshi_path", "tokenizer_path", "config_path"]),
        "first_codebook_weight_multiplier": 1.0,
        "text_padding_weight": 0.5,
        "optim": {"lr": 1e-4, "weight_decay": 0.1, "pct_start": 0.05},
        "seed": 0,
        "num_microbatches": 1,
        "duration_sec": 10.0,
        "batch_size": 1,
        "max_norm": 1.0,
        "max_steps": 100,
        "log_freq": 1,
        "ckpt_freq": 0,
        "save_adapters": True,
        "do_ckpt": True,
        "num_ckpt_keep": 3,
        "keep_best": True,
        "sample_freq": 1,
        "control": False,
        "eval_freq": 0,
        "do_eval": False,
        "gradient_checkpointing": True,
        "wandb": {"project": None, "offline": False, "key": None, "run_name": None},
        "lora": {"enable": False, "rank": 64, "scaling": 2.0, "ft_embed": False},
        "training_mode": "auto",
        "full_finetuning": False,
        "param_dtype": "bfloat16",
        "overwrite_run_dir": False,
        "ttt": {name: getattr(TTTConfig(), name) for name in TTTConfig().names()}
        | {"train_w_down": True, "optim_lr": None, "text_emb_lr": None, "init_target": "identity"}
        | {"first_steps": 0, "stock_lr": None, "as_control": False},
        "checkpoint": {"resume": False, "resume_step": -1},
        "init_from": None,
    }


def test_ttt_keyword_arguments_are_the_patchs_own():
    kwargs = TTTArgs(enabled=True, layers=[1, 3], optim_lr=1e-3).to_kwargs()
    assert kwargs == TTTConfig(enabled=True, layers=[1, 3]).to_kwargs()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("oprim: {lr: 1}", ["oprim={'lr': 1}", "'optim'"]),
        ("optim: {learning_rate: 1e-5}", ["optim.learning_rate='1e-5'", "Allowed in optim: lr, weight_decay"]),
        ("ttt: {chunk_sise: 64}", ["ttt.chunk_sise=64", "did you mean 'ttt.chunk_size'"]),
        ("lr: 1", ["lr=1", "did you mean 'optim.lr'"]),
        ("checkpoint: {resume_stpe: 3}", ["checkpoint.resume_stpe=3", "resume_step"]),
        ("optim: {lr: abc}", ["optim.lr='abc'", "must be a number"]),
        ("batch_size: 2.5", ["batch_size=2.5", "a whole number"]),
        ("batch_size: true", ["batch_size=True", "a whole number"]),
        ("do_eval: 1", ["do_eval=1", "true or false"]),
        ("do_eval: null", ["do_eval=None", "true or false"]),
        ("num_ckpt_keep: all", ["num_ckpt_keep='all'", "a whole number or null"]),
        ("run_dir: [a]", ["run_dir=['a']", "text"]),
        ("lora: true", ["lora=True", "a section with the keys enable, rank"]),
        ("ttt: {layers: [1, x]}", ["ttt.layers=[1, 'x']", "a list of whole numbers or text or null"]),
        ("seed: 1\nseed: 2", ["seed", "twice", "line 2"]),
        ("- a", ["key: value"]),
        ("a: [", ["not valid YAML"]),
        ("a:\n\t- b", ["not valid YAML", "line 2"]),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_at_every_depth(tmp_path, text, named):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_args(path)
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lr: 1e-4}", {"optim": {"lr": 1e-4}}),
        ("optim: {lr: 1}", {"optim": {"lr": 1.0}}),
        ("max_steps: 2e3", {"max_steps": 2000}),
        ("seed: '9007199254740993'", {"seed": 2**53 + 1}),
        ("num_ckpt_keep: null", {"num_ckpt_keep": None}),
        ("ttt: {layers: [1, 3], delta_clip: 5}", {"ttt": {"layers": [1, 3], "delta_clip": 5.0}}),
        ("wandb: {run_name: 7}", {"wandb": {"run_name": "7"}}),
        ("wandb:\nlora:", {}),
    ],
)
def test_values_are_read_as_users_write_them(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert load_args(path) == from_dict(expected)


def test_overrides_are_typed_from_their_fields(files):
    overrides = ["--optim.lr", "1e-5", "--ttt.chunk_size=64", "--do_eval", "--overwrite_run_dir", "false"]
    overrides += ["--num_ckpt_keep", "null", "--ttt.layers", "[2,4]", "--run_dir", "007"]
    overrides += ["--wandb.project", "null", "--wandb.run_name=a=b"]
    args = load_args(files / "run.yaml", overrides)
    assert (args.optim.lr, args.ttt.chunk_size, args.do_eval, args.overwrite_run_dir) == (1e-5, 64, True, False)
    assert (args.num_ckpt_keep, args.ttt.layers, args.run_dir) == (None, [2, 4], "007")
    assert (args.wandb.project, args.wandb.run_name) == (None, "a=b")
    assert args.lora.rank == 128


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--optim.lrr", "1"], ["optim.lrr='1'", "'optim.lr'"]),
        (["--oprim.lr", "1"], ["oprim.lr='1'", "'optim.lr'"]),
        (["--lora.rank.x", "1"], ["lora.rank.x='1'"]),
        (["--lora", "true"], ["lora='true'", "set one of its keys: enable"]),
        (["--optim.lr"], ["optim.lr", "needs a value"]),
        (["--optim.lr", "fast"], ["optim.lr='fast'", "a number"]),
        (["--do_eval", "perhaps"], ["do_eval='perhaps'", "true or false"]),
        (["optim.lr"], ["'optim.lr'", "exactly one YAML file"]),
        (["--ttt.chunk", "8"], ["ttt.chunk='8'", "'ttt.chunk_size'"]),
        (["--nodo_eval"], ["nodo_eval", "'do_eval'"]),
        (["--", "a"], ["exactly one YAML file"]),
    ],
)
def test_wrong_overrides_are_refused(files, overrides, named):
    with pytest.raises(ConfigError) as error:
        load_args(files / "run.yaml", overrides)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("argv", "checkpoint", "lr"),
    [
        ("run.yaml", CheckpointArgs(), 2e-6),
        ("--config run.yaml", CheckpointArgs(), 2e-6),
        ("--config=run.yaml --optim.lr 1e-5", CheckpointArgs(), 1e-5),
        ("--optim.lr 1e-5 run.yaml --resume", CheckpointArgs(True, -1), 1e-5),
        ("--resume run.yaml", CheckpointArgs(True, -1), 2e-6),
        ("--resume 500 run.yaml", CheckpointArgs(True, 500), 2e-6),
        ("run.yaml --resume=0 --optim.lr=1e-5", CheckpointArgs(True, 0), 1e-5),
        ("run.yaml --checkpoint.resume true --checkpoint.resume_step -1", CheckpointArgs(True, -1), 2e-6),
    ],
)
@pytest.mark.usefixtures("files")
def test_the_command_line_in_all_its_forms(argv, checkpoint, lr):
    args = parse_command_line(argv.split())
    assert (args.checkpoint, args.optim.lr) == (checkpoint, lr)


@pytest.mark.parametrize(
    "argv", ["", "run.yaml other.yaml", "--config", "--config=", "none.yaml", ".", "run.yaml --resume=soon"]
)
@pytest.mark.usefixtures("files")
def test_wrong_command_lines_are_refused(argv):
    with pytest.raises(ConfigError, match=r"config|resume_step"):
        parse_command_line(argv.split())


def test_settings_survive_json_but_secrets_do_not(files):
    args = load_args(files / "run.yaml", ["--ttt.layers", "[1,3]", "--wandb.key", "secret"])
    content = json.dumps(to_dict(args))
    assert "secret" not in content
    args.wandb.key = None
    assert from_dict(json.loads(content)) == args


@pytest.mark.parametrize(
    ("ttt", "named"),
    [
        ("{chunk_size: 0}", ["ttt.chunk_size=0", "a whole number from 1 to 1000000"]),
        ("{layers: '1,x'}", ["ttt.layers='1,x'", "middle"]),
        ("{decay: 2}", ["ttt.decay=2.0", "(0, 1]"]),
    ],
)
def test_settings_of_the_patch_are_refused_under_their_key(tmp_path, ttt, named):
    (tmp_path / "run.yaml").write_text(f"ttt: {ttt}")
    with pytest.raises(ConfigError) as error:
        load_args(tmp_path / "run.yaml")
    for part in named:
        assert part in str(error.value)
