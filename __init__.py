"""hybridzoo: interchangeable sequence mixers, assembled from declarative configs.

A model is a YAML file; its layers come from a registry; every SSM layer runs on one selective scan::

    import hybridzoo as zoo

    model = zoo.build("jamba-tiny", ["d_model=256"])
    out = model(input_ids, labels=input_ids)

Dimension letters, here and in every docstring: ``b`` batch, ``l`` sequence length, ``d`` channels (``d_model``, or ``d_inner =
expand * d_model`` inside an SSM), ``n`` state size, ``h`` heads, ``p`` head dimension, ``g`` groups, ``q`` chunk, ``e`` experts,
``v`` vocabulary, ``k`` top-k, convolution width, or scan paths. *Mixer* is the part, *block* is norm + mixer + residual, *pattern* is
the list of blocks, *model* is the network, *state* is what a sequence leaves behind.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .zoo.autoregister import register_when_loaded

if TYPE_CHECKING:
    from .eval.run import evaluate as evaluate
    from .layers import Mixer
    from .zoo.checkpoint import load, save
    from .zoo.config.resolve import load_config as config
    from .zoo.config.shipped import list_models
    from .zoo.importing import import_mixers
    from .zoo.models.build import build, param_groups
    from .zoo.registry import ConfigError, list_mixers, register_mixer
    from .zoo.train.captured_step import CapturedStep
    from .zoo.train.run import train as train

__all__ = [
    "CapturedStep",
    "ConfigError",
    "Mixer",
    "build",
    "config",
    "import_mixers",
    "list_mixers",
    "list_models",
    "load",
    "param_groups",
    "register_mixer",
    "save",
]
__version__ = "0.1.0"

# not in __all__: `from hybridzoo import *` works without the extras, and does not wait for transformers and lm-eval
_WITH_EXTRAS = {"evaluate": (".eval.run", "evaluate"), "train": (".zoo.train.run", "train")}
# name: where it is, and what it is called there; loaded when first asked for, so that `zoo --help` does not wait for torch
_PUBLIC = {
    "CapturedStep": (".zoo.train.captured_step", "CapturedStep"),
    "ConfigError": (".zoo.registry", "ConfigError"),
    "Mixer": (".layers", "Mixer"),
    "build": (".zoo.models.build", "build"),
    "config": (".zoo.config.resolve", "load_config"),
    "import_mixers": (".zoo.importing", "import_mixers"),
    "list_mixers": (".zoo.registry", "list_mixers"),
    "list_models": (".zoo.config.shipped", "list_models"),
    "load": (".zoo.checkpoint", "load"),
    "param_groups": (".zoo.models.build", "param_groups"),
    "register_mixer": (".zoo.registry", "register_mixer"),
    "save": (".zoo.checkpoint", "save"),
} | _WITH_EXTRAS


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        try:
            value = getattr(importlib.import_module(module, __name__), attribute)
        except ModuleNotFoundError as e:
            if name not in _WITH_EXTRAS or (e.name or "").startswith(__name__):
                raise
            extra = {"evaluate": "eval"}.get(name, name)
            raise ModuleNotFoundError(
                f"{__name__}.{name} needs {e.name}. Install it with: pip install 'hybridzoo[{extra}]'", name=e.name
            ) from e
    elif name in ("layers", "kernels"):
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_when_loaded()
