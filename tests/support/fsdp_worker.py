"""One of two gloo processes on the CPU: the same tiny model sharded by FSDP and whole, and a report of what differs.

Run as `python -m tests.support.fsdp_worker RENDEZVOUS RANK REPORT CASE`: two paths, a number and
a JSON object of `Case`.
"""

import functools
import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from moshi.models import LMModel
from moshi.modules.lora import replace_all_linear_with_lora
from moshi.modules.transformer import StreamingTransformerLayer
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

import moshi_patch
from finetune.common.distributed import cleanup
from tests.support.models import random_codes, randomise_targets, relative, tiny_model, ttt_settings

WORLD = 2
ROWS = 2
"""Per process."""

STEPS = 24


@dataclass
class Case:
    """What is trained, and how it is wrapped.

    Attributes:
        lora: adapters on every linear layer, and the policy that also wraps what is trainable by itself.
        train: parts of the names of trainable parameters; None: everything.
        checkpointing: recompute each layer in backward.
        orig_params: `use_orig_params` of FSDP.
        meta: the second process builds its model on the meta device and gets all weights from the state dict.
        bare: the LoRA policy wraps modules without parameters too, as `all([])` is true.
        settings: TTT settings beside the usual ones.
    """

    lora: bool = False
    train: list[str] | None = None
    checkpointing: bool = False
    orig_params: bool = False
    meta: bool = False
    bare: bool = False
    settings: dict = field(default_factory=dict)


def build(case: Case, device: str = "cpu") -> LMModel:
    settings = {"positional_embedding": "none", "device": device, **ttt_settings(**case.settings)}
    model = randomise_targets(tiny_model(gradient_checkpointing=case.checkpointing, **settings))
    if case.lora:
        replace_all_linear_with_lora(model, 3, 2.0)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)  # nothing, on meta
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.train is None or any(part in name for part in case.train))
    return model.train()


def shard(case: Case, model: LMModel) -> FullyShardedDataParallel:
    """With the two policies of moshi-finetune, unchanged."""
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=(StreamingTransformerLayer,))
    if case.lora:

        def trainable(module: torch.nn.Module) -> bool:
            parameters = list(module.parameters())
            return (case.bare or bool(parameters)) and all(p.requires_grad for p in parameters)

        policies = [functools.partial(lambda_auto_wrap_policy, lambda_fn=trainable), policy]
        policy = functools.partial(_or_policy, policies=policies)
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=case.orig_params,
        device_id=torch.device("cpu"),
        param_init_fn=lambda module: module.to_empty(device="cpu", recurse=False),
    )
    FullyShardedDataParallel.set_state_dict_type(sharded, StateDictType.FULL_STATE_DICT)
    return sharded


def loss_of(model: torch.nn.Module, codes: torch.Tensor) -> torch.Tensor:
    """Depends on all logits, and is a mean over rows: its mean over processes is that of the whole batch."""
    out = model(codes)
    audio = out.logits.nan_to_num().logsumexp(-1).mean()
    return audio + out.text_logits.logsumexp(-1).mean() + out.text_logits[..., 0].square().mean()


def compare(case: Case, rank: int) -> dict:
    """Two gradients without an update between, as in accumulation; one plain SGD step; a full state dict and back.

    The gradients are read off that step, whose rate is so large that the weights themselves vanish beside it: FSDP only
    shows the gradients of original parameters, and training needs no more than the step to be right.
    """
    whole, sharded = build(case), shard(case, build(case, "meta" if case.meta and rank else "cpu"))
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    if case.meta:
        sharded.load_state_dict(before)
    trained = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e6) for m in (whole, sharded)]
    codes = random_codes(whole, ROWS * WORLD, STEPS)
    mine = codes[rank * ROWS : (rank + 1) * ROWS]
    report = {
        "wrapped": [wrapped_name(n) for n, m in sharded.named_modules() if type(m) is FullyShardedDataParallel],
        "meta": [name for name, parameter in sharded.named_parameters() if parameter.is_meta],
        "trained": trained,
    }

    own = loss_of(whole, mine).item()
    for scale in (1.0, 0.5):
        loss, expected = loss_of(sharded, mine), loss_of(whole, codes)
        (scale * loss).backward()
        (scale * expected).backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        report["own_loss"] = max(report.get("own_loss", 0.0), abs(loss.item() / own - 1))
        report["mean_loss"] = max(report.get("mean_loss", 0.0), abs((mean / WORLD / expected).item() - 1))
    with moshi_patch.ttt_updates(whole):
        report["updates_off"] = abs(loss_of(whole, mine).item() / own - 1)
    report["without_gradient"] = [name for name in trained if not whole.get_parameter(name).grad.any()]
    for optimizer in optimizers:
        optimizer.step()

    after, wanted = sharded.state_dict(), whole.state_dict()
    report["other_keys"] = sorted(set(after) ^ set(wanted))
    report["gradient"] = {name: relative(after[name] - before[name], wanted[name] - before[name]) for name in wanted}
    report["frozen_but_moved"] = [n for n in after if n not in trained and not torch.equal(after[n], before[n])]
    sharded.load_state_dict(before)
    report["not_restored"] = [n for n, value in sharded.state_dict().items() if not torch.equal(value, before[n])]
    report["restored_loss"] = abs(loss_of(sharded, mine).item() / own - 1)
    return report


def wrapped_name(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removesuffix("._fsdp_wrapped_module")


def main(rendezvous: str, rank: int, report: str, case: Case) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    moshi_patch.install()
    result = compare(case, rank)
    with open(report, "w") as file:
        json.dump(result, file)
    cleanup()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Case(**json.loads(sys.argv[4])))
