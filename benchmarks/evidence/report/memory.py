"""The tables about memory and settings: recall, capacity, associations, shift, one setting at a time, speech."""

import dataclasses

from ..results import Results, mean, nats, spread, values
from ..settings import Settings
from .blocks import block, gap_table, table, three_marks


@block
def headline(results: Results) -> str:
    """Recall: the three kinds of token, the control beside it, what it costs."""
    stock, ttt = results.find("recall", model="none"), results.find("recall", model="ttt")
    longer = results.find("recall equal bytes")
    rows = []
    for name, lines, condition in (
        ("no TTT", stock, "none"),
        ("no TTT, longer attention of equal memory", longer, "none"),
        ("TTT", ttt, "on"),
        ("the same weights, updates off", ttt, "off"),
    ):
        cost = [spread(values(lines, lambda line: line["training"]["peak_bytes"] / 2**20), 0)]
        rows.append(three_marks(name, lines, condition, ("first", "within", "beyond")) + cost)
    header = ["nats per token, mean (lowest–highest)", "first pass", "within window", "beyond window", "seeds", "MiB"]
    return table(header, rows)


@block
def gaps(results: Results) -> str:
    """Recall by the length of the gap."""
    found = {
        "no TTT": (results.find("recall", model="none"), "none"),
        "no TTT, longer attention of equal memory": (results.find("recall equal bytes"), "none"),
        "TTT": (results.find("recall", model="ttt"), "on"),
        "the same weights, updates off": (results.find("recall", model="ttt"), "off"),
    }
    found |= {f"TTT, decay {d}": (results.find("decay by gap", decay=d), "on") for d in (0.99, 0.9)}
    return gap_table(found)


@block
def capacity(results: Results) -> str:
    """Recall by the amount to remember."""
    cells = {part: results.find("capacity", part=part) for part in (16, 64, 128)}
    cells[32] = results.find("recall", model="ttt")
    rows = [
        [
            str(part),
            spread(values(cells[part], nats("on"))),
            spread(values(cells[part], nats("on", kind="hits")), 0, percent=True),
            spread(values(cells[part], nats("off"))),
            str(len(cells[part])),
        ]
        for part in sorted(cells)
    ]
    return table(["tokens to remember", "nats", "accuracy, %", "updates off", "seeds"], rows)


@block
def associations(results: Results) -> str:
    """Accuracy by the number of pairs."""
    stock, ttt = (results.find("associations", model=model) for model in ("none", "ttt"))
    if not results.has("associations"):
        return "The grid has no cell `associations`."
    settings = results.cell_settings("associations")[0]
    rows = []
    for pairs in settings.pairs:
        row = [str(pairs)]
        for lines, condition in ((stock, "none"), (ttt, "on"), (ttt, "off")):
            row.append(spread(values(lines, nats(condition, "beyond", f"pairs {pairs}", "hits")), 0, percent=True))
        rows.append([*row, str(len(ttt))])
    chance = f"chance is {100 / (3 * settings.card // 8):.1f} %"
    return table(["pairs", f"no TTT ({chance})", "TTT", "the same weights, updates off", "seeds"], rows)


@block
def shift(results: Results) -> str:
    """Loss before and after the rule of the stream changes."""
    found = {"no TTT": (results.find("shift", model="none"), "none")}
    found["TTT"] = (results.find("shift", model="ttt"), "on")
    found["the same weights, updates off"] = (found["TTT"][0], "off")
    for settings in results.cell_settings("shift settings") if results.has("shift settings") else []:
        found[f"TTT, decay {settings.decay}"] = (results.find("shift settings", decay=settings.decay), "on")
    times = ("before", "since_0", "since_16", "since_32", "since_64", "since_96")
    rows = [
        [name, *(spread(values(lines, nats(condition, mark))) for mark in times), str(len(lines))]
        for name, (lines, condition) in found.items()
    ]
    header = ["nats per ruled step", "32 steps before"]
    return table(
        [*header, *(f"{t.removeprefix('since_')} to {int(t[6:]) + 16} after" for t in times[1:]), "seeds"], rows
    )


ONE_AT_A_TIME = (
    "chunk", "rate", "kernel", "full convolution", "hidden states", "one layer", "one learning rate", "decay", "clip",
)  # fmt: skip


@block
def settings(results: Results) -> str:
    """What one setting at a time does to the recall of the headline cell."""
    base = results.find("recall", model="ttt")
    base_mean = mean(values(base, nats("on")))
    found = [(["**as in the first table**", ""], base)]
    for name in ONE_AT_A_TIME:
        for chosen in results.cell_settings(name) if results.has(name) else []:
            found.append((changed(chosen), results.same(chosen)))
    rows = []
    for names, lines in found:
        on = values(lines, nats("on"))
        numbers = [
            spread(values(lines, nats("on", "within"))),
            spread(on),
            f"{mean(on) - base_mean:+.2f}" if on else "–",
        ]
        rows.append([*names, *numbers, spread(values(lines, nats("off"))), str(len(lines))])
    return table(
        ["setting", "value", "within window", "beyond window", "difference", "beyond, updates off", "seeds"], rows
    )


def changed(chosen: Settings) -> list[str]:
    """Name and value of the first field that differs from the defaults."""
    plain = Settings()
    names = {"chunk": "C", "rate": "η", "kernel": "K", "ttt_layers": "only layer", "target_lr": "target_lr"}
    for field in dataclasses.fields(Settings):
        value = getattr(chosen, field.name)
        if field.name != "seed" and value != getattr(plain, field.name):
            return [names.get(field.name, field.name), str(value)]
    return ["", ""]


@block
def speech(results: Results) -> str:
    """Real recordings."""
    stock, ttt = (results.find("speech", model=model) for model in ("none", "ttt"))
    rows = []
    for variation, name in (
        ("", "held-out dialogue"),
        ("held out, renamed", "the same, codes renamed"),
        ("trained on", "training dialogues"),
    ):
        for lines, condition, model in (
            (stock, "none", "no TTT"),
            (ttt, "on", "TTT"),
            (ttt, "off", "TTT, updates off"),
        ):
            marks = [spread(values(lines, nats(condition, mark, variation))) for mark in ("first", "beyond")]
            hits = spread(values(lines, nats(condition, "beyond", variation, "hits")), 0, percent=True)
            rows.append([name, model, *marks, hits, str(len(lines))])
    return table(["evaluated on", "model", "nats, first pass", "nats, returned", "accuracy returned, %", "seeds"], rows)
