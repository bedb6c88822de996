"""`Settings`: everything a run depends on, checked before anything is built, and the id that names it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from moshi_patch import TTTConfig

from .forms import check_form

TASKS = ("recall", "assoc", "shift", "speech", "dialogue")
MODELS = ("none", "ttt")
TRAINED = ("full", "lora")
STREAMS = (None, "fresh", "silence", "own")

RESIDUAL: dict[str, Any] = {"rate": 0.1, "ttt": {"update": "residual", "target_gain": 16.0}}
"""What the pages call *residual*, beside the settings of a task."""

AFTER_TRAINING = ("stream", "stream_windows", "stream_decay", "stream_clip", "sweep", "gaps", "eval_batch")
"""Fields that only matter once the model is trained."""

ADDED = (
    *("echo", "returns", "gaps", "init_target", "conv_lr", "text_lr", "schedule", "measure_every", "probe_every"),
    *("stop_below", "targets_first", "then_rate", "ttt", "units", "units_from", "form", "stock_rate"),
    "recordings",
)
"""Fields that came after the first committed results. With its default such a field stands neither in a line of the
results nor in its identifier, so that a new field leaves the identifiers of all earlier runs as they are."""

OWN_NAMES = {
    "enabled": "model", "layers": "ttt_layers", "layer_frequency": "ttt_layers", "start_layer": "ttt_layers",
    "chunk_size": "chunk", "learning_rate": "rate", "conv_kernel_size": "kernel", "conv_depthwise": "depthwise",
    "target": "target", "delta_clip": "clip", "decay": "decay",
}  # fmt: skip
"""Arguments of `TTTConfig` that have a field of their own here; the others go into `ttt`."""

IN_PLACE = (
    "chunk",
    "rate",
    "kernel",
    "depthwise",
    "target",
    "clip",
    "decay",
    "stream_decay",
    "stream_clip",
    "probe_every",
)
"""Fields that the kind `mlp` does not have."""


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. Lengths are in steps.

    Args:
        task: `"recall"`, `"assoc"`, `"shift"`, `"speech"` or `"dialogue"`, see `tasks`, `speech` and `dialogue`.
        model: `"none"`, a stock `LMModel`, or `"ttt"`.
        seed: of weights and training sequences.
        steps, batch: of training; `batch` sequences per step.
        lr, target_lr: AdamW's learning rates for the stock weights and for the target generators.
        beta2: of AdamW.
        card: tokens of the text row and codes of an audio row.
        width, layers, heads: of the transformer.
        window: steps that one attention layer sees.
        equal_bytes: attention sees as many steps as the TTT state's bytes would hold keys and values of.
        ttt_layers, chunk, rate, kernel, depthwise, target, clip, decay: the `ttt_*` arguments; `rate` is η.
        audio_rows, audio: rows beside the text row, of random codes (`"random"`) or of the zero token (`"zero"`).
        part, gap_min, gap_max, eval_gap: of `recall` and `speech`: what returns, and after how long.
        quiet: of `recall`: share of the training sequences whose gap is silence, one token again and again.
        pairs: of `assoc`: numbers of pairs, a training batch draws one of them.
        length: of `shift` and `dialogue`: steps of a stream.
        jump: of `shift`: the share of steps that follow no rule.
        base_steps: training of a stock model on `base_task` that the run starts from; 0 starts from random weights.
        base_task: task of that training.
        trained: `"full"`, or `"lora"`: adapters of rank `rank` (and the target generators) and nothing else.
        stream: None, or what the trained model hears between the parts of a long stream: `"fresh"` random tokens,
            `"silence"` (one token) or its `"own"` samples.
        stream_windows: length of that stream, in windows.
        stream_decay, stream_clip: `ttt_decay` and `ttt_delta_clip` in the stream; None for those of the training.
        sweep: evaluate by gap, too (`recall`, `speech`).
        eval_batch: held-out sequences per number.
        echo: of `recall`: tokens at the start of the gap that are repeated at once, for attention to copy; 0 for none.
        returns: of `recall`: False draws anew what should return, so that there is nothing to learn.
        gaps: of `recall`: gaps of the sweep, in windows.
        init_target: where W_target begins, as in `finetune.model.initial_targets`.
        conv_lr, text_lr: learning rates of the filters of the target generators and of the text embedding; None for
            `target_lr` and `lr`.
        schedule: `"cosine"`, the learning rates fall to a tenth; or `"constant"`.
        measure_every: training steps between two evaluations on the way; 0 for none.
        probe_every: training steps between two looks into the TTT layers (see `probe`); a multiple of `measure_every`.
        stop_below: nats beyond the window at which such an evaluation ends the training.
        targets_first, then_rate: in so many steps only the target generators and W_down of the TTT layers train;
            afterwards everything does, with `then_rate` times its learning rate.
        stock_rate: factor of the learning rates of all weights but those, as the trainer's `ttt.stock_lr`.
        units, units_from: of `recall`: from training step `units_from` on a sequence is so many sequences in a row, and
            a batch has as many fewer rows, so that it hears as many tokens. Evaluations are of one.
        ttt: further `ttt_*` arguments, without the prefix, such as `{"update": "residual"}`.
        form: changes of the update that are tried here alone, such as `{"gate": True}`; see `forms`.
        recordings: of `speech`: the example's `"dialogues"`, or `"prompts"`, see `prompts`.

    Raises:
        ValueError: for a value that is not allowed, or a task that attention alone could solve.
    """

    task: str = "recall"
    model: str = "ttt"
    seed: int = 0
    steps: int = 300
    batch: int = 16
    lr: float = 4e-3
    target_lr: float = 2e-2
    beta2: float = 0.95
    card: int = 44
    width: int = 64
    layers: int = 2
    heads: int = 4
    window: int = 16
    equal_bytes: bool = False
    ttt_layers: str = "all"
    chunk: int = 16
    rate: float = 1.0
    kernel: int = 2
    depthwise: bool = True
    target: str = "token_embeddings"
    clip: float | None = None
    decay: float = 1.0
    audio_rows: int = 1
    audio: str = "zero"
    part: int = 32
    gap_min: int = 16
    gap_max: int = 64
    eval_gap: int = 36
    quiet: float = 0.0
    pairs: tuple[int, ...] = (4, 8, 16)
    length: int = 256
    jump: float = 0.25
    base_steps: int = 0
    base_task: str = "local"
    trained: str = "full"
    rank: int = 8
    stream: str | None = None
    stream_windows: int = 64
    stream_decay: float | None = None
    stream_clip: float | None = None
    sweep: bool = False
    eval_batch: int = 128
    echo: int = 8
    returns: bool = True
    gaps: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    init_target: str = "identity"
    conv_lr: float | None = None
    text_lr: float | None = None
    schedule: str = "cosine"
    measure_every: int = 0
    probe_every: int = 0
    stop_below: float = 0.0
    targets_first: int = 0
    then_rate: float = 1.0
    ttt: tuple[tuple[str, Any], ...] = ()
    form: tuple[tuple[str, Any], ...] = ()
    stock_rate: float = 1.0
    units: int = 1
    units_from: int = 0
    recordings: str = "dialogues"

    def __post_init__(self):
        object.__setattr__(self, "pairs", tuple(self.pairs))
        object.__setattr__(self, "gaps", tuple(self.gaps))
        for name in ("ttt", "form"):
            object.__setattr__(self, name, tuple(sorted(dict(getattr(self, name)).items())))
        self._check_values()
        self._check_task()

    def _check_values(self) -> None:
        choices = {"task": (*TASKS, "local"), "model": MODELS, "trained": TRAINED, "stream": STREAMS}
        choices |= {"base_task": ("local", "recall", "dialogue"), "audio": ("zero", "random")}
        choices |= {"schedule": ("cosine", "constant"), "init_target": ("identity", "readout")}
        choices |= {"recordings": ("dialogues", "prompts")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {names}.")
        counts = dict.fromkeys(("batch", "part", "gap_min", "window", "chunk", "eval_batch", "length", "units"), 1)
        zero = ("steps", "base_steps", "echo", "measure_every", "probe_every", "targets_first", "units_from")
        for name, least in (counts | dict.fromkeys(zero, 0)).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}.")
        if self.probe_every and self.kernel < 2:
            raise ValueError(
                f"probe_every={self.probe_every}, kernel={self.kernel}: a probe needs the filter's next step."
            )
        if self.probe_every and (not self.measure_every or self.probe_every % self.measure_every):
            raise ValueError(
                f"probe_every={self.probe_every}: must be a multiple of measure_every={self.measure_every}."
            )
        if self.stop_below and not self.measure_every:
            raise ValueError(f"stop_below={self.stop_below}, measure_every=0: nothing is measured on the way.")
        allowed = sorted({field.name for field in dataclasses.fields(TTTConfig)} - set(OWN_NAMES))
        for name, _ in self.ttt:
            if name not in allowed:
                meant = f"set {OWN_NAMES[name]!r} instead" if name in OWN_NAMES else f"allowed are {allowed}"
                raise ValueError(f"ttt: {name!r}: no further argument of TTT; {meant}.")
        TTTConfig(**dict(self.ttt))  # says what is wrong with a value
        for name in IN_PLACE if self.kind == "mlp" else ():
            if getattr(self, name) != getattr(Settings, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: not with ttt kind 'mlp'.")
        check_form(dict(self.form), self.model == "ttt")

    def _check_task(self) -> None:
        if self.measure_every and self.task != "recall":
            raise ValueError(f"measure_every={self.measure_every}, task={self.task!r}: must be 0 for all but recall.")
        if self.units > 1 and (self.task != "recall" or self.batch % self.units):
            raise ValueError(
                f"units={self.units}, task={self.task!r}, batch={self.batch}: only sequences of recall are put in a "
                "row, and the batch must be a multiple of units."
            )
        if self.trained == "lora" and not self.base_steps:
            raise ValueError("trained='lora', base_steps=0: adapters need a trained model to start from.")
        if self.stream and self.task != "recall":
            raise ValueError(f"stream={self.stream!r}: the long stream is made of the recall task, not {self.task!r}.")
        keys = 3 * self.card // 8
        if self.task == "assoc" and max(self.pairs) + 2 > keys:
            raise ValueError(
                f"pairs={list(self.pairs)}, card={self.card}: {keys} keys are enough for {keys - 2} pairs."
            )
        nearest = self.part + min(self.gap_min, self.eval_gap) - 1
        if self.task in ("recall", "speech") and nearest <= self.reach:
            raise ValueError(
                f"part={self.part}, gap_min={self.gap_min}, eval_gap={self.eval_gap}: a returning token is {nearest} "
                f"steps back and attention reaches {self.reach}; it must lie outside."
            )

    @property
    def kind(self) -> str:
        """`ttt_kind`."""
        return dict(self.ttt).get("kind", "in_place")

    @property
    def reach(self) -> int:
        """Steps that the attention layers of window `window` reach back together."""
        return self.layers * (self.window - 1)

    @property
    def hidden(self) -> int:
        """H of moshi's gated MLP at its default scale of 4."""
        return 21 * self.width // 8

    @property
    def context(self) -> int:
        """Steps that one attention layer sees: `window`, or the longer one of equal memory.

        A TTT layer keeps the delta, `D·H` values, and two chunks of z and v, `2 C (H + D)`; attention keeps `2 D`
        values per step. One of the kind mlp keeps per head of width d two layers with biases, `(d + 1) 4d + (4d + 1) d`
        values, and the entries of two mini-batches, `2 C (10d + 2)`. All are counted with the same bytes per value.
        """
        if not self.equal_bytes:
            return self.window
        state = self.width * self.hidden + 2 * self.chunk * (self.hidden + self.width)
        if self.kind == "mlp":
            size, head = TTTConfig(**dict(self.ttt)).mini_batch_size, self.width // self.heads
            state = self.heads * ((head + 1) * 4 * head + (4 * head + 1) * head + 2 * size * (10 * head + 2))
        return self.window + state // (2 * self.width)

    def training(self) -> "Settings":
        """The same run without what only matters once the model is trained."""
        return dataclasses.replace(self, **{name: getattr(Settings, name) for name in AFTER_TRAINING})

    def base(self) -> "Settings | None":
        """The training of the stock model that the run starts from; None where it starts from random weights."""
        if not self.base_steps:
            return None
        same = {n: getattr(self, n) for n in ("seed", "card", "width", "layers", "heads", "window", "batch")}
        return Settings(**same, task=self.base_task, model="none", steps=self.base_steps)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that depend on every field that `as_dict` gives."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them; those of `ADDED` only where they differ from their default."""
        content = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ADDED or getattr(self, field.name) != field.default
        }
        return json.loads(json.dumps(content))
