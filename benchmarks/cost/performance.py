"""Makes the tables of docs/performance.md from the committed results: `python -m benchmarks.cost.performance`.

The page is written by hand around markers; what stands between `<!-- name -->` and `<!-- end name -->` is replaced.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pages import fill
from finetune.common.tables import markdown

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


def result(name: str) -> dict[str, Any]:
    """What `benchmarks/NAME.py` committed."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def ratios(row: dict[str, Any], *keys: str) -> list[str]:
    """Numbers of a result, with two digits behind the point."""
    return [f"{row[key]:.2f}" for key in keys]


def machines() -> str:
    names = ("layer", "layer_scaling", "step", "train_step", "roofline", "evaluation", "server", "server_30_minutes")
    names += ("layer_residual", "step_residual", "hybrid", "hybrid_bfloat16", "hybrid_4096", "hybrid_memory")
    rows = []
    for name in names:
        machine = result(name)["machine"]
        rows.append([f"`{name}.json`", *(machine[key] for key in ("cpu", "threads", "torch", "moshi", "date"))])
    return markdown(["result", "processor", "threads", "torch", "moshi", "date"], rows)


FORMS = {"ttt": "this one", "residual": "residual update", "materialised": "materialised (Algorithm 1)"}


def layer(name: str = "layer") -> str:
    rows = [row for row in result(name)["rows"] if row["variant"] != "stock"]
    return markdown(
        ["T", "", "form", "time", "range over rounds", "by operations", "peak memory"],
        [
            [
                row["steps"],
                row["direction"],
                FORMS[row["variant"]],
                f"{row['time_ratio']:.2f}",
                "–".join(f"{value:.2f}" for value in row["time_ratio_range"]),
                f"{row['operations_ratio']:.2f}",
                f"{row['memory_ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def layer_residual() -> str:
    return layer("layer_residual")


def layer_scaling() -> str:
    rows = [row for row in result("layer_scaling")["rows"] if row["variant"] == "ttt"]
    return markdown(
        ["T", "", "time", "by operations", "peak memory"],
        [
            [row["steps"], row["direction"], *ratios(row, "time_ratio", "operations_ratio", "memory_ratio")]
            for row in rows
        ],
    )


def step() -> str:
    keys = ("ratio_p50", "stock_p99_over_p50", "ttt_p99_over_p50", "chunk_end_over_p50", "slowest_phase_over_p50")
    header = ["TTT / stock", "stock p99 / p50", "TTT p99 / p50", "end of a chunk / p50", "slowest phase / p50"]
    rows = result("step")["results"]
    return markdown(
        ["rows", "update", *header],
        [[row["rows"], row.get("update", "hebbian"), *ratios(row, *keys)] for row in rows],
    )


def step_residual() -> str:
    keys = ("ratio_p50", "ratio_to_hebbian_p50", "stock_p99_over_p50", "ttt_p99_over_p50", "slowest_phase_over_p50")
    header = ["TTT / stock", "over the paper's", "stock p99 / p50", "TTT p99 / p50", "slowest phase / p50"]
    rows = result("step_residual")["results"]
    return markdown(["rows", "update", *header], [[row["rows"], row["update"], *ratios(row, *keys)] for row in rows])


def train_step() -> str:
    found = result("train_step")["results"]
    return markdown(
        ["32 layers, rank 64, 625 steps", "time", "range over rounds", "peak memory"],
        [
            [
                name,
                f"{row['time_ratio']:.2f}",
                "–".join(f"{value:.2f}" for value in row["time_ratio_range"]),
                f"{row['memory_ratio']:.2f}",
            ]
            for name, row in found.items()
        ],
    )


def roofline() -> str:
    found = result("roofline")
    rates = found["rates"]
    steps = markdown(
        ["streaming step, rows", "TTT / stock", "by bytes", "share of bandwidth: stock", "with TTT"],
        [
            [row["rows"], *ratios(row, "ratio", "ratio_by_bytes", "bandwidth_share_stock", "bandwidth_share_ttt")]
            for row in found["step"]
        ],
    )
    layers = markdown(
        ["gated MLP, D 4096", "TTT / stock", "by operations", "share of the rate: stock", "with TTT"],
        [
            [row["direction"], *ratios(row, "ratio", "ratio_by_operations", "rate_share_stock", "rate_share_ttt")]
            for row in found["layer"]
        ],
    )
    measured = (
        f"Measured: {rates['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s read, "
        f"{rates['bf16_multiply_adds_per_second'] / 1e9:.0f} G multiply-adds/s in bfloat16."
    )
    return f"{measured}\n\n{steps}\n\n{layers}"


def moshi_7b() -> str:
    rows, columns = [], ("stock", "delta", "fold", "rings", "whitening", "target")
    for row in result("roofline")["moshi_7b"]:
        parts = [f"{row['bytes'].get(key, 0) / 1e9:.2f}" for key in columns]
        rows.append([row["rows"], row.get("update", "hebbian"), *parts, f"{row['ratio_by_bytes']:.2f}"])
    header = ["rows", "update", "stock, GB", "delta", "fold", "rings", "M", "W_target", "TTT / stock by bytes"]
    return markdown(header, rows)


def hybrid() -> str:
    rows = []
    for found in map(result, ("hybrid", "hybrid_bfloat16", "hybrid_4096")):
        settings = found["settings"]
        rows += [[f"D {settings['dim']}, {settings['dtype']}", *_hybrid(row)] for row in found["rows"]]
    header = ["one layer", "", "C", "processor time", "quartiles", "by operations", "state, MiB a row"]
    return markdown(header, rows)


def _hybrid(row: dict[str, Any]) -> list[str]:
    quartiles = "–".join(f"{value:.2f}" for value in row["quartiles"])
    state = f"{row['state_bytes_per_row'] / 2**20:.1f}" if "state_bytes_per_row" in row else ""
    time, counted = ratios(row, "time_ratio", "operations_ratio")
    return [row["place"], row["mini_batch_size"], time, quartiles, counted, state]


def hybrid_memory() -> str:
    peaks: dict[int, dict[int, int]] = {}
    for row in result("hybrid_memory")["memory"]:
        peaks.setdefault(row["mini_batch_size"], {})[row["group_size"]] = row["bytes"]
    rows = [[size, *(f"{found[group] / 2**30:.2f}" for group in (0, 8))] for size, found in peaks.items()]
    return markdown(["C", "all kept, GiB", "groups of 8 computed again, GiB"], rows)


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        *(machines, layer, layer_residual, layer_scaling, step, step_residual),
        *(train_step, roofline, moshi_7b, hybrid, hybrid_memory),
    )
}


def main() -> None:
    PAGE.write_text(fill(PAGE.read_text(), PARTS))
    print(PAGE)


if __name__ == "__main__":
    main()
