"""A picture of the two updates: a fact is written once, then silence is heard for a long time. No model, no training.

`python -m benchmarks.evidence.two_updates [--out FILE.svg]`

Random keys of unit length and random targets. The fact is one chunk; silence is chunks of one key and one target, each
blurred by a tenth. After every chunk the memory is asked for both.

Shapes: `D` width, `H` hidden width, `C` chunk size.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from moshi_patch.kinds.in_place.ops import naive

OUT = Path(__file__).parents[1] / "results" / "two_updates.svg"
D, H, C, RATE = 16, 64, 16, 1.0
MEMORIES = {
    "hebbian": {"update": "hebbian"},
    "hebbian, decay 0.98": {"update": "hebbian", "decay": 0.98},
    "residual": {"update": "residual"},
}


def hear(silent_chunks: int, seed: int = 0, **options) -> tuple[list[float], list[float]]:
    """After the fact and after each silent chunk: the error about the fact, and how loud silence is answered.

    Both are relative to what was said: 1 is an error as large as the fact, and an answer as large as silence's target.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)

    fact, silence = (random(C, H), random(C, D)), (random(1, H), random(1, D))
    w_down, delta = torch.zeros(D, H, dtype=torch.float64), None
    errors, answers = [], []
    for chunk in range(1 + silent_chunks):
        heard = fact if chunk == 0 else tuple(part + 0.1 * random(C, part.shape[1]) for part in silence)
        _, delta = naive(*(part[None] for part in heard), w_down, C, RATE, delta=delta, **options)
        errors.append(((fact[0] @ delta[0].T - fact[1]).norm() / fact[1].norm()).item())
        answers.append(((silence[0] @ delta[0].T).norm() / silence[1].norm()).item())
    return errors, answers


def draw(path: Path, silent_chunks: int) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, options in MEMORIES.items():
        for axes, values in zip(panels, hear(silent_chunks, **options), strict=True):
            axes.plot(range(1 + silent_chunks), values, label=name)
    for axes, title in zip(panels, ("error about the fact", "answer to silence / its target"), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_yscale("log")
        axes.axhline(1.0, color="grey", linewidth=1, linestyle=":")
        axes.set_xlabel("chunks of silence heard since the fact")
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize="small")
    with mpl.rc_context({"svg.hashsalt": "two_updates", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--chunks", type=int, default=200)
    args = parser.parse_args()
    draw(args.out, args.chunks)


if __name__ == "__main__":
    main()
