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

from typing import TYPE_CHECKING

from .zoo.autoregister import register_when_loaded
from .zoo.lazily import lazily

if TYPE_CHECKING:
    from .eval.evaluate import evaluate as evaluate
    from .layers import Mixer
    from .zoo.checkpoint import load, save
    from .zoo.config.resolve import load_config as config
    from .zoo.config.shipped import list_models
    from .zoo.images.predict import predict
    from .zoo.importing import import_mixers
    from .zoo.models.build import build, param_groups
    from .zoo.models.prefix_tree import PrefixTree
    from .zoo.models.state import ModelState
    from .zoo.registry import ConfigError, list_mixers, register_mixer
    from .zoo.train.captured_step import CapturedStep
    from .zoo.train.run import train as train

__all__ = [
    "CapturedStep",
    "ConfigError",
    "Mixer",
    "ModelState",
    "PrefixTree",
    "build",
    "config",
    "import_mixers",
    "list_mixers",
    "list_models",
    "load",
    "param_groups",
    "predict",
    "register_mixer",
    "save",
]
__version__ = "0.1.0"

# Loaded when first asked for, so that `zoo --help` does not wait for torch. What needs an extra is not in __all__: `from hybridzoo
# import *` works without the extras, and does not wait for transformers and lm-eval.
__getattr__, __dir__ = lazily(
    __name__,
    extras={"train": "train"},
    CapturedStep="zoo.train.captured_step",
    ConfigError="zoo.registry",
    Mixer="layers",
    ModelState="zoo.models.state",
    PrefixTree="zoo.models.prefix_tree",
    build="zoo.models.build",
    config="zoo.config.resolve:load_config",
    eval="eval",
    evaluate="eval.evaluate",
    import_mixers="zoo.importing",
    kernels="kernels",
    layers="layers",
    list_mixers="zoo.registry",
    list_models="zoo.config.shipped",
    load="zoo.checkpoint",
    param_groups="zoo.models.build",
    predict="zoo.images.predict",
    register_mixer="zoo.registry",
    save="zoo.checkpoint",
    train="zoo.train.run",
)

register_when_loaded()
