"""`install()`: the stock `LMModel` constructor learns the `ttt_*` keyword arguments; `uninstall()` takes that back."""

import functools
import inspect
import warnings

import moshi
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import RingKVCache, StreamingTransformer, StreamingTransformerLayer

from .call import pass_arguments
from .config import PREFIX, TTTConfig
from .healing import forget_on_reset
from .kinds import CLASSES
from .loading import prepare_weights, refuse_ancestors

_stock_init = None
"""`LMModel.__init__` as :func:`install` found it."""

_ttt_init = None
"""What :func:`install` put in its place."""


def install() -> None:
    """Let `LMModel(..., ttt_enabled=True, ttt_...)` build models with TTT. Calling it again does nothing.

    The constructor is wrapped on the class, so every name the class is known by and everything that forwards keyword
    arguments to it (`lm_kwargs_overrides`, `config.json`, `CheckpointInfo`, `moshi.server`) carries TTT.

    Raises:
        RuntimeError: when the installed moshi lacks something the patch builds on; nothing is changed then.
    """
    global _stock_init, _ttt_init
    if is_installed():
        return
    check_moshi()
    _stock_init, _ttt_init = LMModel.__init__, _with_ttt(LMModel.__init__)
    LMModel.__init__ = _ttt_init


def uninstall() -> None:
    """Give `LMModel` its stock constructor back. Models built before keep what they have."""
    if is_installed():
        LMModel.__init__ = _stock_init


def is_installed() -> bool:
    """Whether `LMModel` takes `ttt_*` keyword arguments now."""
    return _ttt_init is not None and LMModel.__init__ is _ttt_init


def check_moshi() -> None:
    """Check what the patch builds on by signature: moshi's wheel and its repository share a version and differ.

    Raises:
        RuntimeError: naming each function that is not as expected.
    """
    problems = [
        f"{function.__qualname__}{inspect.signature(function)} should {need}"
        for function, need, fits in (
            (LMModel.__init__, "pass **kwargs on to its transformer", _takes_any_keyword),
            (StreamingTransformer.forward, "pass **kwargs on to its layers", _takes_any_keyword),
            (StreamingTransformerLayer._ff_block, "take x alone", _takes(2)),
            (ActivationGating.forward, "take x alone", _takes(2)),
            (State.reset, "take a reset_mask", _takes(2)),
            (RingKVCache.reset, "take a reset_mask", _takes(2)),
            (State.set_exec_mask, "take an exec_mask", _takes(2)),
            (StreamingModule._init_streaming_state, "take a batch_size", _takes(2)),
        )
        if not fits(inspect.signature(function).parameters)
    ]
    if problems:
        raise RuntimeError(
            f"moshi {moshi.__version__} at {moshi.__path__[0]} does not fit moshi_patch (made for moshi>=0.2.13,<0.3): "
            + "; ".join(problems)
        )


def _takes_any_keyword(parameters) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _takes(count: int):
    return lambda parameters: len(parameters) == count


def _with_ttt(stock_init):
    @functools.wraps(stock_init)
    def init(self, *args, **kwargs):
        ttt = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(PREFIX)}
        config = TTTConfig.from_kwargs(ttt)
        misplaced = [key for key in kwargs if key.startswith("depformer_" + PREFIX)]
        if misplaced:
            raise ValueError(f"{misplaced[0]}={kwargs[misplaced[0]]!r}: the depformer never gets TTT.")
        if not config.enabled:
            if ttt and "ttt_enabled" not in ttt:
                warnings.warn(f"TTT is off: {', '.join(ttt)} given without ttt_enabled=True.", stacklevel=2)
            stock_init(self, *args, **kwargs)
            self._register_load_state_dict_pre_hook(refuse_ancestors, with_module=True)
            return
        layers = _check_model(config, kwargs)
        stock_init(self, *args, **kwargs)
        _add_ttt(self, config, layers)

    return init


def _check_model(config: TTTConfig, kwargs: dict) -> list[int]:
    """The TTT layers of the model that `kwargs` describe, or ValueError before anything is built."""
    if kwargs.get("weights_per_step"):
        raise ValueError(
            f"weights_per_step={kwargs['weights_per_step']!r}: ttt_enabled=True needs one MLP per layer, so 0."
        )
    num_layers = kwargs.get("num_layers")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers={num_layers!r}: must be a positive whole number.")
    stock = {name: parameter.default for name, parameter in inspect.signature(LMModel.__init__).parameters.items()}
    CLASSES[config.kind].check_model(config, {"gating": "none"} | stock | kwargs)
    return config.layer_indices(num_layers)


def _add_ttt(model: LMModel, config: TTTConfig, layers: list[int]) -> None:
    """Give memories to a model that the stock constructor has finished: it re-initialises what exists before."""
    device, kind = model.text_emb.weight.device, CLASSES[config.kind]
    memories = [
        kind.add_to(model.transformer.layers[index], config, device=device, dtype=model.dtype) for index in layers
    ]
    pass_arguments(model.transformer, memories, with_x0=kind.needs_x0(config))
    forget_on_reset(model)
    model._register_load_state_dict_pre_hook(prepare_weights, with_module=True)
    model.ttt_config = config
