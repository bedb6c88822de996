"""`python -m moshi_patch tests.support.serve_probe LOG ARGS...`: moshi.server, with a log of its fast weights.

After every reset and every step of the server's `LMGen`, one line of JSON goes to LOG. The server is the one that
`python -m moshi_patch moshi.server ARGS...` starts.
"""

import dataclasses
import json
import runpy
import sys
from typing import Any

import moshi.models
import torch
from moshi.models import LMGen

import moshi_patch
from moshi_patch.serving.stock_server import add_conversations, split_options


class ObservedLMGen(LMGen):
    """A stock `LMGen` that reports its streaming state after each reset and step.

    Attributes:
        log: the file to append to.
    """

    log: str

    def reset_streaming(self, reset_mask: torch.Tensor | None = None) -> None:
        super().reset_streaming(reset_mask)
        write_down("reset", self)

    def step(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        tokens = super().step(*args, **kwargs)
        write_down("step", self)
        return tokens


def write_down(event: str, lm_gen: ObservedLMGen) -> None:
    """Appends `{"event", "fresh", "position", "updates", "delta_norm"}`, the last three with one entry per layer."""
    gatings = moshi_patch.ttt_gatings(lm_gen.lm_model).values()
    stats = moshi_patch.ttt_stats(lm_gen.lm_model).values()
    line = {
        "event": event,
        "fresh": all(is_fresh(gating) for gating in gatings),
        "position": [gating.get_streaming_state()[""].fast.position.item() for gating in gatings],
        "updates": [layer["updates"][0] for layer in stats],
        "delta_norm": [layer["delta_norm"][0] for layer in stats],
    }
    with open(lm_gen.log, "a") as file:
        file.write(json.dumps(line) + "\n")


def is_fresh(gating: moshi_patch.TTTGating) -> bool:
    """Whether all that `gating` remembers is, bit for bit, what it remembers before it has heard anything."""
    state = gating.get_streaming_state()[""].fast
    fresh = gating._init_streaming_state(1).fast
    names = [field.name for field in dataclasses.fields(state)]
    return all(torch.equal(getattr(state, name), getattr(fresh, name)) for name in names)


if __name__ == "__main__":
    ObservedLMGen.log = sys.argv[1]
    options, arguments = split_options(sys.argv[2:])
    sys.argv = ["moshi.server", *arguments]
    moshi.models.LMGen = ObservedLMGen
    with add_conversations(options):
        runpy.run_module("moshi.server", run_name="__main__", alter_sys=True)
