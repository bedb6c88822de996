"""Makes a tiny local repository, laid out like Moshi's on the Hub: language model, Mimi and text tokenizer.

    python example/tiny_repo.py tiny_repo              # a stock model, as training starts from
    python example/tiny_repo.py tiny_repo_ttt --ttt    # with TTT, whose fast weights move (or --ttt-kind mlp)
    python -m moshi_patch moshi.run_inference --device cpu --hf-repo tiny_repo_ttt --batch-size 1 in.wav out.wav

All weights are random. It shows that the machinery runs, and answers nothing sensible.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import sphn
import torch
from moshi.models import LMModel, MimiModel, loaders
from safetensors.torch import save_file

import moshi_patch

KINDS = ("in_place", "mlp")
DATA = Path(__file__).parent / "data"

LM: dict[str, Any] = {
    "dim": 64,
    "num_heads": 4,
    "num_layers": 4,
    "hidden_scale": 4.125,
    "n_q": 8,
    "dep_q": 4,
    "card": 64,
    "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1],
    "context": 16,
    "max_period": 10000,
    "causal": True,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 32,
    "depformer_dim_feedforward": 132,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "depformer_multi_linear": True,
    "existing_text_padding_id": 3,
}
"""A scaled-down Moshi as in its `config.json`; `text_card` is the tokenizer's.

Four attention layers of window 16 reach 60 steps back together, 4.8 s: the fact of an example dialogue returns later.
"""

TTT: dict[str, Any] = {
    "ttt_enabled": True,
    "ttt_layers": [1, 3],
    "ttt_chunk_size": 16,
    "ttt_learning_rate": 1e-3,
}
"""A chunk of 16 steps is 1.28 s: a few seconds of speech make several updates."""

TTT_MLP: dict[str, Any] = {
    "ttt_enabled": True,
    "ttt_kind": "mlp",
    "ttt_layers": [1, 3],
    "ttt_mini_batch_size": 16,
    "ttt_base_lr": 1.0,
}
"""The same layers with the other kind of memory."""

CONV_STD, TARGET_STD = 0.5, 0.1
"""Spread of what opens a memory (the filters of a target generator, the gate of an MLP) and of all else that TTT adds,
around what it begins as."""

NAMES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
}

MIMI_CODEBOOKS, MIMI_WIDTH = 8, 32


def make_tiny_repo(folder: str | Path, seed: int = 0, ttt: bool = False, **lm_overrides: Any) -> Path:
    """Writes the repository and returns its folder; the same seed and overrides give the same weights.

    Args:
        folder: made if it does not exist; files in it are overwritten.
        seed: of all weights.
        ttt: adds TTT with random target generators, so that the fast weights move. (Those that training starts with
            write nothing: their filters are zero.) The other weights are those of the stock model.
        **lm_overrides: replace or add arguments of `LMModel`, `ttt_` ones included, in `config.json`. A `card` other
            than 64 also changes Mimi's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer()
    (folder / NAMES["tokenizer_name"]).write_bytes(tokenizer)
    text_card = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
    settings = TTT_MLP if lm_overrides.get("ttt_kind") == "mlp" else TTT
    lm_config = {**LM, "text_card": text_card, **(settings if ttt else {}), **lm_overrides}
    mimi_settings = mimi_config(bins=lm_config["card"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save(_make_mimi(mimi_settings), folder / NAMES["mimi_name"])
        _save(_make_lm(lm_config), folder / NAMES["moshi_name"])
    _write_json(folder / NAMES["mimi_config_name"], mimi_settings)
    # Greedy, so that the same speech gets the same answer.
    _write_json(folder / "config.json", {**lm_config, **NAMES, "lm_gen_config": {"use_sampling": False}})
    return folder


def _train_tokenizer() -> bytes:
    """A sentencepiece model of the dialogues' words, with the special ids of Moshi's: 0 unknown, 3 padding."""
    lines = [
        " ".join(word for word, _, _ in json.loads(path.read_text())["alignments"])
        for path in sorted(DATA.glob("*.json"))
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=96,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def mimi_config(bins: int) -> dict[str, Any]:
    """Mimi with narrow layers: one step of 80 ms is 960 samples by the SEANet, times 2 by the resampling."""
    transformer = loaders._transformer_kwargs | {
        "d_model": MIMI_WIDTH,
        "num_heads": 2,
        "num_layers": 1,
        "context": 25,
        "dim_feedforward": 2 * MIMI_WIDTH,
        "input_dimension": MIMI_WIDTH,
        "output_dimensions": [MIMI_WIDTH],
    }
    return {
        "sample_rate": loaders.SAMPLE_RATE,
        "channels": 1,
        "frame_rate": loaders.FRAME_RATE,
        "seanet": loaders._seanet_kwargs | {"dimension": MIMI_WIDTH, "n_filters": 4},
        "transformer": transformer,
        "quantizer": {
            "dimension": 16,
            "n_q": MIMI_CODEBOOKS,
            "bins": bins,
            "input_dimension": MIMI_WIDTH,
            "output_dimension": MIMI_WIDTH,
        },
    }


def _make_mimi(config: dict[str, Any]) -> MimiModel:
    """A random Mimi whose codebooks fit the example's speech."""
    return fit_mimi(config, [torch.from_numpy(sphn.read(str(path))[0])[:, None] for path in sorted(DATA.glob("*.wav"))])


@torch.no_grad()
def fit_mimi(config: dict[str, Any], speech: Sequence[torch.Tensor]) -> MimiModel:
    """A random Mimi whose codebooks fit `speech`, so that different sounds get different codes.

    Args:
        config: as `mimi_config` returns it.
        speech: recordings `[channels, 1, samples]` at Mimi's sample rate.
    """
    mimi = loaders.get_mimi(None, config, num_codebooks=MIMI_CODEBOOKS)
    latent = torch.cat([channel for pcm in speech for channel in mimi.encode_to_latent(pcm, quantize=False)], 1)
    mimi.quantizer.train()  # in training, the first batches place the codebooks by k-means, one codebook at a time
    for _ in range(MIMI_CODEBOOKS):
        mimi.quantizer(latent[None], mimi.frame_rate)
    return mimi.eval()


@torch.no_grad()
def _make_lm(config: dict[str, Any]) -> LMModel:
    installed = moshi_patch.is_installed()
    moshi_patch.install()
    try:
        model = LMModel(**config)
    finally:
        if not installed:
            moshi_patch.uninstall()
    for name, parameter in moshi_patch.ttt_parameters(model).items():
        opens = name.endswith(("conv.weight", "gating_alpha"))
        parameter += torch.randn_like(parameter) * (CONV_STD if opens else TARGET_STD)
    return model


def _save(model: torch.nn.Module, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttt", action="store_true", help="with TTT and random target generators; default: stock")
    parser.add_argument("--ttt-kind", choices=KINDS, help="with --ttt, the kind of memory; default: in_place")
    args = parser.parse_args(argv)
    if args.ttt_kind and not args.ttt:
        parser.error("--ttt-kind: only with --ttt")
    overrides = {"ttt_kind": args.ttt_kind} if args.ttt_kind not in (None, KINDS[0]) else {}
    print(make_tiny_repo(args.folder, args.seed, args.ttt, **overrides))


if __name__ == "__main__":
    main()
