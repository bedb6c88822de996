"""What trains, in which group and at which rate.

`parameter_groups` is the one place that decides; everything else (`requires_grad`, the optimizer, the table in the log,
what a checkpoint of adapters holds) follows from it.
"""

from dataclasses import dataclass

from moshi.conditioners import ConditionProvider
from moshi.models.lm_utils import ScaledEmbedding
from torch import nn

import moshi_patch
from moshi_patch import stock_name

from ..common.errors import ConfigError
from ..common.tables import columns
from ..settings.modes import trains_ttt
from ..settings.schema import TrainArgs, TTTArgs
from .adapters import lora_parameters

TARGET_LR_MULTIPLE = 5.0
"""`ttt.optim_lr: null` is this multiple of `optim.lr`: target generators start at zero, beside weights that are trained
already. On the recall task (docs/evidence_recall.md) it shortened the plateau before memory sets in."""


NEW_WEIGHTS = {"in_place": "target_generators", "mlp": "ttt_layers"}
"""By kind of memory, the group of the weights that a stock model has not."""

UNDECAYED = "ttt_gates_and_biases"
"""Of those, what weight decay leaves alone."""

FIRST_GROUPS = (*NEW_WEIGHTS.values(), UNDECAYED, "w_down")
"""What trains from the first step on; the other groups wait for `ttt.first_steps`."""


@dataclass
class ParameterGroup:
    """Parameters that train at one rate.

    Args:
        name: one of `FIRST_GROUPS`, or `text_embedding`, `adapters`, `embeddings` or `base`.
        parameters: by their names in the unwrapped model. Under FSDP each holds this rank's share.
        lr: the peak learning rate.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float

    @property
    def decays(self) -> bool:
        """Whether `optim.weight_decay` counts."""
        return self.name != UNDECAYED


def parameter_groups(model: nn.Module, args: TrainArgs) -> list[ParameterGroup]:
    """Everything that trains, by what it is in the structure of `model`, wrapped or not.

    - the new weights of TTT layers, at `ttt.optim_lr`: `target_generators`; or, with `ttt.kind: mlp`, `ttt_layers` and
      `ttt_gates_and_biases`, which weight decay leaves alone;
    - `w_down`, the base down projections of TTT layers, in full also under LoRA, with `ttt.train_w_down`. An adapter on
      top of a W_down that trains would be redundant and stays as it is;
    - `text_embedding` at `ttt.text_emb_lr`, when that is set;
    - `adapters` with `lora.enable`;
    - `embeddings` in full fine-tuning, and with `lora.ft_embed`;
    - `base`, the rest, in full fine-tuning. Condition providers never train.

    The last three train at `ttt.stock_lr` where that is set. With `ttt.as_control` all of it trains but the target
    generators, which a model without TTT does not have. `training_mode: lora` leaves out the first three, and W_down
    has its adapters; `frozen` leaves out everything.

    Raises:
        ConfigError: when nothing would train, in any mode but `frozen`.
    """
    if args.training_mode == "frozen":
        return []
    ttt, lr = args.ttt, args.optim.lr
    with_ttt, own = ttt.enabled or ttt.as_control, trains_ttt(args)
    in_place = with_ttt and ttt.kind == "in_place"
    w_down, idle_adapters = _down_projections(model, ttt) if in_place else (set(), set())
    text_lr, stock_lr = ttt.text_emb_lr, (ttt.stock_lr if with_ttt else None) or lr
    new_lr, new_train = ttt.optim_lr or TARGET_LR_MULTIPLE * lr, ttt.enabled and own
    roles = [
        ("frozen", _owned_by(model, ConditionProvider), 0.0, False),
        *((name, new, new_lr, new_train) for name, new in _new_weights(model)),
        ("w_down", w_down, lr, ttt.train_w_down and own),
        ("frozen", idle_adapters if ttt.train_w_down and own else set(), 0.0, False),
        ("text_embedding", _text_embedding(model) if text_lr else set(), text_lr or 0.0, with_ttt),
        ("adapters", set(lora_parameters(model).values()), stock_lr, args.lora.enable),
        (
            "embeddings",
            _owned_by(model, ScaledEmbedding),
            stock_lr,
            args.full_finetuning or (args.lora.enable and args.lora.ft_embed),
        ),
        ("base", set(model.parameters()), stock_lr, args.full_finetuning),
    ]
    members: list[dict[str, nn.Parameter]] = [{} for _ in roles]
    for name, parameter in model.named_parameters():
        first = next(index for index, (_, owned, _, _) in enumerate(roles) if parameter in owned)
        members[first][stock_name(name)] = parameter
    groups = [
        ParameterGroup(name, found, lr)
        for (name, _, lr, trains), found in zip(roles, members, strict=True)
        if trains and found
    ]
    if not groups:
        raise ConfigError("Nothing would be trained; set one of full_finetuning, lora.enable and ttt.enabled to true.")
    return groups


def _new_weights(model: nn.Module) -> list[tuple[str, set[nn.Parameter]]]:
    """What a stock model has not, by group."""
    found: dict[str, set[nn.Parameter]] = {}
    for memory in moshi_patch.ttt_memories(model).values():
        for key, parameter in memory.new_parameters().items():
            group = UNDECAYED if stock_name(key) in memory.undecayed_keys else NEW_WEIGHTS[memory.config.kind]
            found.setdefault(group, set()).add(parameter)
    return list(found.items())


def _owned_by(model: nn.Module, kind: type[nn.Module]) -> set[nn.Parameter]:
    return {p for module in model.modules() if isinstance(module, kind) for p in module.parameters()}


def _text_embedding(model: nn.Module) -> set[nn.Parameter]:
    """What its `ScaledEmbedding` owns by itself. Adapters on parts of it are adapters."""
    found = {p for name, module in model.named_modules() if stock_name(name) == "text_emb" for p in module.parameters()}
    return found - set(lora_parameters(model).values())


def _down_projections(model: nn.Module, ttt: TTTArgs) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Of all layers with TTT, or those that would have it: the base weights of W_down, and the adapters on them."""
    gatings = list(moshi_patch.ttt_gatings(model).values())
    if ttt.as_control:
        names = {f"transformer.layers.{layer}.gating" for layer in ttt.layer_indices(len(model.transformer.layers))}
        gatings = [module for name, module in model.named_modules() if stock_name(name) in names]
    down = {parameter for gating in gatings for parameter in gating.linear_out.parameters()}
    adapters = down & set(lora_parameters(model).values())
    return down - adapters, adapters


def describe(groups: list[ParameterGroup], sizes: dict[str, int], total: int) -> str:
    """A table: group, tensors, parameters, learning rate.

    Args:
        sizes: number of values per parameter name, in the whole model; under FSDP a rank holds less.
        total: number of values of the whole model.
    """
    rows = []
    for group in groups:
        number = sum(sizes[name] for name in group.parameters)
        rows.append((group.name, str(len(group.parameters)), f"{number:,}", f"{group.lr:g}"))
    frozen = total - sum(sizes[name] for group in groups for name in group.parameters)
    rows.append(("(frozen)", "", f"{frozen:,}", "0"))
    return columns(["group", "tensors", "parameters", "learning rate"], rows)
