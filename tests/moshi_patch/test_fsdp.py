"""Sharded equals whole: FSDP in two gloo processes on the CPU, under the unchanged wrap policies of moshi-finetune."""

import json
from pathlib import Path

import pytest

from tests.support.fsdp_worker import WORLD
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow

TARGETS = "target_generator"
MLP = {"ttt_kind": "mlp"}
LORA = {"lora": True, "train": ["lora_", TARGETS]}
CASES = {
    "everything": {},
    "everything-checkpointing-orig_params": {"checkpointing": True, "orig_params": True},
    "lora": LORA,
    "lora-second_process_on_meta": {**LORA, "meta": True},
    "lora-checkpointing": {**LORA, "checkpointing": True},
    "lora-w_down-orig_params-residual": {
        "lora": True,
        "train": ["lora_", TARGETS, "gating.linear_out"],
        "orig_params": True,
        "settings": {"ttt_update": "residual", "ttt_target_gain": 2.0},
    },
    "lora-modules_without_parameters": {**LORA, "bare": True, "orig_params": True},
    "lora-full_conv-clip-decay-hidden_states": {
        **LORA,
        "checkpointing": True,
        "settings": {
            "ttt_conv_depthwise": False,
            "ttt_delta_clip": 0.5,
            "ttt_decay": 0.9,
            "ttt_target": "hidden_states",
        },
    },
    "mlp-everything": {"settings": MLP},
    "mlp-lora": {"lora": True, "train": ["lora_", ".ttt."], "settings": MLP},
    "mlp-lora-second_process_on_meta": {"lora": True, "train": ["lora_", ".ttt."], "meta": True, "settings": MLP},
    "mlp-alone-checkpointing-orig_params": {
        "lora": True,
        "train": [".ttt."],
        "checkpointing": True,
        "orig_params": True,
        "settings": {**MLP, "ttt_scan_checkpoint_group_size": 2},
    },
    "targets_alone": {"lora": True, "train": [TARGETS]},
    # x0 carries a gradient while the layers it is handed to are frozen: FSDP must not drop a layer's weights when the
    # gradient of one of its inputs has come, while that of the other is still to be computed.
    "embeddings_alone": {"lora": True, "train": ["emb"]},
    "embeddings_alone-checkpointing-orig_params": {"train": ["emb"], "checkpointing": True, "orig_params": True},
}
TOLERANCE = 1e-12
"""float64; what differs is the order in which two halves of a batch are summed."""


def run(case: dict, folder: Path) -> list[dict]:
    """The reports of both processes."""
    reports = [folder / f"report{rank}.json" for rank in range(WORLD)]
    words = [[folder / "rendezvous", rank, reports[rank], json.dumps(case)] for rank in range(WORLD)]
    run_processes("tests.support.fsdp_worker", words, folder)
    return [json.loads(report.read_text()) for report in reports]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sharded_loss_gradients_and_state_dict_equal_the_whole_model(case, tmp_path):
    reports, mlp = run(case, tmp_path), "ttt_kind" in case.get("settings", {})
    for report in reports:
        assert report["meta"] == []
        layers = {f"transformer.layers.{i}" for i in range(4)}
        assert layers <= set(report["wrapped"])
        if TARGETS in case.get("train", ()):
            assert f"transformer.layers.1.gating.{TARGETS}" in report["wrapped"]
        if ".ttt." in case.get("train", ()):
            assert {f"transformer.layers.1.ttt{part}" for part in ("", ".wq", ".post_norm")} <= set(report["wrapped"])
        assert report["updates_off"] > (1e-4 if mlp else 1e-3)  # TTT takes part in this loss
        assert report["own_loss"] < TOLERANCE
        assert report["mean_loss"] < TOLERANCE
        assert report["without_gradient"] == []
        assert {name: error for name, error in report["gradient"].items() if not error < TOLERANCE} == {}
        assert report["frozen_but_moved"] == []
        assert report["other_keys"] == []
        assert report["not_restored"] == []
        assert report["restored_loss"] < TOLERANCE
    new = ".ttt." if mlp else TARGETS
    for part in case.get("train", [new, "linear_in", "emb"]):
        assert any(part in name for name in reports[0]["trained"])
    assert reports[0]["updates_off"] != reports[1]["updates_off"]  # the processes hear different rows
