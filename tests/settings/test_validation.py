"""Settings that cannot work are refused before any model is loaded, with the key, its value and the remedy."""

from dataclasses import replace

import pytest

from finetune.common.errors import ConfigError
from finetune.settings.schema import TrainArgs, TTTArgs
from finetune.settings.validation import unusual_settings, validate


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder, made the current one, with what the settings refer to."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "weights.safetensors"):
        (tmp_path / name).touch()


def good(**changes) -> TrainArgs:
    """Settings that pass, with dotted changes (`lora__rank` is `lora.rank`)."""
    args = TrainArgs(run_dir="run", full_finetuning=True, save_adapters=False)
    args.data.train_data = "train.jsonl"
    for name, value in changes.items():
        *path, key = name.split("__")
        owner = args
        for part in path:
            owner = getattr(owner, part)
        if isinstance(owner, TTTArgs):
            args.ttt = replace(owner, **{key: value})
        else:
            setattr(owner, key, value)
    return args


LONG = 300 * "x"
"""A name that no file system holds: asking for it is an error of its own."""

BAD = [
    ({"lora__enable": True}, ["full_finetuning=True", "lora.enable"]),
    ({"full_finetuning": False}, ["nothing would be trained", "ttt.enabled"]),
    ({"ttt__enabled": True}, ["duration_sec=10.0", "125 steps", "chunk_size=256", "above 20.48", "below 125"]),
    ({"ttt__enabled": True, "ttt__chunk_size": 125}, ["duration_sec=10.0", "chunk_size=125"]),
    ({"ttt__optim_lr": 0.0}, ["ttt.optim_lr=0.0", "or null"]),
    ({"ttt__text_emb_lr": -1.0}, ["ttt.text_emb_lr=-1.0", "or null"]),
    ({"ttt__init_target": "random"}, ["ttt.init_target='random'", "identity, readout"]),
    ({"batch_size": 0}, ["batch_size=0", "a whole number from 1 to 4096."]),
    ({"duration_sec": float("nan")}, ["duration_sec=nan", "a number at least 0.08 and at most 3600."]),
    ({"max_steps": -5}, ["max_steps=-5", "from 1 to 1e+09"]),
    ({"num_ckpt_keep": 0}, ["num_ckpt_keep=0", "or null"]),
    ({"optim__lr": float("inf")}, ["optim.lr=inf", "above 0 and at most 1000"]),
    ({"optim__pct_start": 1.5}, ["optim.pct_start=1.5", "below 1"]),
    ({"optim__pct_start": 1.0}, ["optim.pct_start=1.0", "below 1"]),
    ({"max_steps": 20}, ["optim.pct_start=0.05", "max_steps=20", "OneCycleLR"]),
    ({"text_padding_weight": -0.5}, ["text_padding_weight=-0.5", "at least 0"]),
    ({"seed": -1}, ["seed=-1", "from 0 to 9223372036854775807"]),
    ({"seed": 2**63}, ["seed=9223372036854775808", "from 0 to"]),
    ({"lora__enable": True, "full_finetuning": False, "lora__rank": 0}, ["lora.rank=0", "from 1 to 16384"]),
    ({"param_dtype": "int8"}, ["param_dtype='int8'", "bfloat16"]),
    ({"checkpoint__resume_step": -2}, ["checkpoint.resume_step=-2", "from -1 to"]),
    ({"run_dir": ""}, ["run_dir=''", "required"]),
    ({"data__train_data": ""}, ["data.train_data=''", "required"]),
    (
        {"data__train_data": "train.jsonl,gone.jsonl"},
        ["data.train_data='train.jsonl,gone.jsonl'", "gone.jsonl: no such"],
    ),
    ({"data__train_data": "train.jsonl:0"}, ["train.jsonl:0", "share"]),
    ({"data__train_data": ","}, ["data.train_data=','", "is required"]),
    ({"data__train_data": ":2"}, ["data.train_data=':2'", "no list before the colon"]),
    ({"do_eval": True}, ["data.eval_data=''", "do_eval=false"]),
    ({"do_eval": True, "data__eval_data": "gone"}, ["data.eval_data='gone'", "no such"]),
    ({"moshi_paths__moshi_path": "gone.safetensors"}, ["moshi_paths.moshi_path='gone.safetensors'", "no such file"]),
    ({"moshi_paths__hf_repo_id": None}, ["moshi_paths.mimi_path=None", "hf_repo_id is null"]),
    (
        {"moshi_paths__hf_repo_id": "/no/such/folder"},
        ["moshi_paths.hf_repo_id='/no/such/folder'", "no such folder", "OWNER/NAME"],
    ),
    ({"moshi_paths__mimi_path": "hf://kyutai"}, ["moshi_paths.mimi_path='hf://kyutai'", "hf://OWNER/NAME/FILE"]),
    ({"moshi_paths__config_path": "."}, ["moshi_paths.config_path='.'", "is a folder"]),
    ({"moshi_paths__hf_repo_id": ""}, ["moshi_paths.hf_repo_id=''", "no such folder"]),
    ({"moshi_paths__hf_repo_id": "train.jsonl"}, ["moshi_paths.hf_repo_id='train.jsonl'", "is a file"]),
    ({"init_from": "gone"}, ["init_from='gone'", "no such"]),
    ({"init_from": LONG}, [f"init_from='{LONG}'", "no such"]),
    ({"data__train_data": LONG}, [f"data.train_data='{LONG}'", "no such"]),
    ({"moshi_paths__mimi_path": LONG}, [f"moshi_paths.mimi_path='{LONG}'", "no such"]),
    ({"moshi_paths__hf_repo_id": f"/{LONG}"}, [f"moshi_paths.hf_repo_id='/{LONG}'", "OWNER/NAME"]),
    ({"wandb__project": ""}, ["wandb.project=''", "null"]),
]


@pytest.mark.parametrize(("changes", "named"), BAD, ids=[named[0][:40] for _, named in BAD])
@pytest.mark.usefixtures("files")
def test_bad_settings_name_key_value_and_remedy(changes, named):
    validate(good())
    with pytest.raises(ConfigError) as error:
        validate(good(**changes))
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"save_adapters": True}, "save_adapters=True"),
        ({"full_finetuning": False, "lora__enable": True}, "save_adapters=False"),
        ({"lora__ft_embed": True}, "lora.ft_embed=True"),
        ({"ttt__enabled": True, "duration_sec": 30.0}, "ttt.chunk_size=256 of 375 steps"),
        ({"param_dtype": "float16"}, "param_dtype='float16'"),
    ],
)
@pytest.mark.usefixtures("files")
def test_what_is_tolerated_is_said(changes, named):
    args = good(**changes)
    validate(args)
    (message,) = unusual_settings(args)
    assert named in message


@pytest.mark.usefixtures("files")
def test_local_files_may_be_given_as_moshi_takes_them():
    paths = {f"moshi_paths__{name}": "file://weights.safetensors" for name in ("mimi_path", "tokenizer_path")}
    assert validate(good(moshi_paths__moshi_path="hf://kyutai/moshiko/model.safetensors", **paths)) is None
