"""All settings of a training run: moshi-finetune's YAML keys and defaults, plus `ttt:`, `checkpoint:`, `init_from`.

The text below a field is its help: what it means and its unit. What it may be stands beside its default.
"""

import re
from dataclasses import dataclass, field, fields

from moshi_patch import TTTConfig

from .limits import choice, number, whole

STEPS_PER_SECOND = 12.5
"""Mimi's frame rate: one step of the language model is 80 ms."""

PARAM_DTYPES = ("bfloat16", "float32", "float16")
INITIAL_TARGETS = ("identity", "readout")
"""Where W_target of a new target generator may begin."""

RATES = {"in_place": "learning_rate", "mlp": "base_lr"}
"""By kind of memory, the setting of `ttt` that its fast weights' steps grow with."""

MODES = ("auto", "full", "lora", "ttt", "lora+ttt", "frozen")
"""What a run may train; see `modes`."""

MANY = 10**9
"""Steps: more than any run has."""


@dataclass
class DataArgs:
    """Training data: lists of audio files."""

    train_data: str = ""
    """required: a .jsonl list, a folder of lists, or several joined by commas, each with an optional `:share`"""
    eval_data: str = ""
    """held-out lists, in the same form; required with do_eval"""
    shuffle: bool = False
    """a new order of the segments in each epoch"""


@dataclass
class MoshiPaths:
    """The base model: a Hub repository, and files that replace some or all of its own."""

    hf_repo_id: str | None = "kyutai/moshiko-pytorch-bf16"
    """repository on the Hub, or a folder laid out like one; null: the files below alone"""
    mimi_path: str | None = None
    """file of Mimi's weights, in place of the repository's; a path, or hf://OWNER/NAME/FILE"""
    moshi_path: str | None = None
    """file of the language model's weights, in place of the repository's"""
    tokenizer_path: str | None = None
    """file of the text tokenizer (SentencePiece), in place of the repository's"""
    config_path: str | None = None
    """file of the language model's configuration, in place of the repository's config.json"""


@dataclass
class OptimArgs:
    """AdamW (betas 0.9 and 0.95, eps 1e-8) under OneCycleLR."""

    lr: float = number(1e-4, above=0, most=1000)
    """peak learning rate; 2e-6 for adapters on Moshi 7B, 1e-5 for all of its weights"""
    weight_decay: float = number(0.1, least=0, most=1000)
    """AdamW's decoupled weight decay"""
    pct_start: float = number(0.05, least=0, below=1)
    """share of all steps in which the learning rate warms up"""


@dataclass
class LoraArgs:
    """Adapters."""

    enable: bool = False
    """train adapters on every linear layer; the recipe for Moshi 7B is rank 128, scaling 2.0, optim.lr 2e-6"""
    rank: int = whole(64, 1, 16384)
    """rank of the adapters; best well below the model's width, 4096 in Moshi 7B"""
    scaling: float = number(2.0, above=0, most=1e6)
    """factor of what the adapters add"""
    ft_embed: bool = False
    """train the embeddings in full beside the adapters"""


@dataclass
class WandbArgs:
    """Weights & Biases; needs `pip install wandb`."""

    project: str | None = None
    """project that the run is logged to; null: Weights & Biases is off"""
    offline: bool = False
    """log to the disk alone, for `wandb sync`"""
    key: str | None = None
    """API key; never saved with the run"""
    run_name: str | None = None
    """name of the run; null: wandb invents one"""


@dataclass(frozen=True)
class TTTArgs(TTTConfig):
    """TTT: the settings of the model, and those that only training needs."""

    train_w_down: bool = field(default=True, metadata={"kind": "in_place"})
    """train W_down of the TTT layers in full, also under LoRA, whose adapters these layers then do not get"""
    optim_lr: float | None = number(None, above=0, most=1000)
    """the optimizer's learning rate for the new weights of TTT layers; null: 5 * optim.lr"""
    text_emb_lr: float | None = number(None, above=0, most=1000)
    """a learning rate for the text embedding, which then trains whatever else does; null: as without TTT"""
    init_target: str = choice("identity", INITIAL_TARGETS, kind="in_place")
    """where W_target of new target generators begins; readout: a map from the model's embeddings and text head"""
    first_steps: int = whole(0, 0, MANY)
    """steps at the start in which new weights and W_down of TTT layers alone train; then all else does too"""
    stock_lr: float | None = number(None, above=0, most=1000)
    """learning rate of all but new weights, W_down and the text embedding; null: optim.lr"""
    as_control: bool = False
    """with enabled false: train all that a run with TTT trains beside its new weights; control sets it"""


@dataclass
class CheckpointArgs:
    """Going on with a run; what `--resume [STEP]` sets."""

    resume: bool = False
    """continue the run in run_dir"""
    resume_step: int = whole(-1, -1, MANY)
    """step of the checkpoint to continue from; -1: the newest complete one"""


@dataclass
class TrainArgs:
    """One training run, as in its YAML file."""

    data: DataArgs = field(default_factory=DataArgs)
    run_dir: str = ""
    """required: folder for checkpoints, metrics and logs; must be new or empty without resume or overwrite_run_dir"""
    moshi_paths: MoshiPaths = field(default_factory=MoshiPaths)
    first_codebook_weight_multiplier: float = number(1.0, above=0, most=1e6)
    """weight of Moshi's first codebook in the audio loss, relative to the others; 100 for Moshi 7B"""
    text_padding_weight: float = number(0.5, least=0, most=1e6)
    """weight of padding in the text loss, relative to words"""
    optim: OptimArgs = field(default_factory=OptimArgs)
    seed: int = whole(0, 0, 2**63 - 1)  # torch takes 64 bits, and each rank adds its number
    """of new weights and of the order of the data"""
    num_microbatches: int = whole(1, 1, 4096)
    """batches per step and process; 2 with half the batch_size is the same step with less memory"""
    duration_sec: float = number(10.0, least=0.08, most=3600)
    """seconds of a segment, 12.5 steps each; with TTT it must be longer than a chunk, best several times"""
    batch_size: int = whole(1, 1, 4096)
    """segments per batch and process"""
    max_norm: float = number(1.0, above=0, most=1e9)
    """largest norm of all gradients together; larger ones are scaled down to it"""
    max_steps: int = whole(100, 1, MANY)
    """optimizer steps of the whole run"""
    log_freq: int = whole(1, 1, MANY)
    """steps between two lines of metrics"""
    ckpt_freq: int = whole(0, 0, MANY)
    """steps between two checkpoints; 0: at the end alone"""
    save_adapters: bool = True
    """with lora.enable, or training_mode ttt, save what trained alone; false: the whole model, adapters merged"""
    do_ckpt: bool = True
    """save checkpoints"""
    num_ckpt_keep: int | None = whole(3, 1, MANY)
    """the newest so many checkpoints are kept; null: all"""
    keep_best: bool = True
    """keep the checkpoint with the lowest held-out loss too, and save one when an evaluation is the best"""
    eval_freq: int = whole(0, 0, MANY)
    """steps between two evaluations on data.eval_data; 0: at the end alone"""
    do_eval: bool = False
    """measure the held-out loss, with updates on and off"""
    sample_freq: int = whole(1, 0, MANY)
    """evaluations between two samples of what the model says; 0: none"""
    control: bool = False
    """afterwards train the same run without TTT, in run_dir/control, to see what TTT changes"""
    gradient_checkpointing: bool = True
    """recompute each layer in backward: less memory, more time"""
    wandb: WandbArgs = field(default_factory=WandbArgs)
    lora: LoraArgs = field(default_factory=LoraArgs)
    training_mode: str = choice("auto", MODES)
    """what trains; auto: as full_finetuning, lora.enable and ttt.enabled say; frozen: nothing, the model is measured"""
    full_finetuning: bool = False
    """train all weights but condition providers; excludes lora.enable; optim.lr 1e-5 for Moshi 7B"""
    param_dtype: str = choice("bfloat16", PARAM_DTYPES)
    """precision of the weights and of what is saved; AdamW computes in float32"""
    overwrite_run_dir: bool = False
    """move an existing run_dir aside, to a name with the time; nothing is deleted"""
    ttt: TTTArgs = field(default_factory=TTTArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    init_from: str | None = None
    """run, checkpoint or weights file whose weights this run begins from; null: the base model's"""


def ttt_names(ttt: TTTConfig) -> list[str]:
    """The settings of a `ttt:` section that its kind has, in the order of the fields."""
    return [one.name for one in fields(ttt) if one.metadata.get("kind") in (None, ttt.kind)]


def ttt_setting(text: str) -> str:
    """`ttt_chunk_size`, as `LMModel` and config.json say, as the setting is called: `ttt.chunk_size`.

    In a message each such name is translated.
    """
    return re.sub(r"\bttt_(?=[a-z])", "ttt.", text)


def ttt_keyword(setting: str) -> str:
    """The inverse of `ttt_setting`, for one name."""
    return re.sub(r"^ttt\.", "ttt_", setting)
