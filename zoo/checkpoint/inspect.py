"""A model's folder before its weights are read: the format, the config, the precision."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, nearest
from . import native
from .blame import culprit
from .families import FAMILIES
from .family import Family
from .fields import Fields
from .files import open_regular, read_json
from .tensors import READABLE, stored_in

__all__ = ["config_of", "detect", "read_config", "stored_dtype"]


def detect(folder: Path) -> Family | None:
    """The converter for a folder; ``None`` if the folder is the zoo's own. Where there is a ``config.json``, it says so."""
    file = folder / "config.json"
    if not file.exists():
        if (folder / native.CONFIG).exists():
            return None
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: holds an adapter of PEFT and no model. Pass the folder of the model that it was merged into (zoo train --lora "
                "writes it around the adapter's), or merge it with PeftModel.from_pretrained and merge_and_unload."
            )
        raise CheckpointError(
            f"{folder}: holds neither {native.CONFIG} nor config.json. Pass a folder that zoo.save, save_pretrained or mamba-ssm "
            "has written."
        )
    config = read_json(file)
    kind = config.get("model_type")
    if kind is None and "d_model" in config and "n_layer" in config:
        kind = "mamba_ssm"
    if kind == "hybridzoo":
        return None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{file}: model_type is {kind!r}, which the zoo does not know.{nearest(kind, FAMILIES)} "
            f"Known: hybridzoo, {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[kind]


def read_config(family: Family | None, folder: Path, tokenizer: str = "byte", deepest: int | None = None) -> Any:
    """Our config for the one in a folder of ``family``, as :func:`detect` says.

    For other formats than ours: the ``tokenizer`` that it shall name unless the converter knows better, and how many layers the stored
    tensors show (``deepest``): a config of many more is refused before it is built.
    """
    if family is None:
        return native.read_config(folder)
    file = folder / "config.json"
    fields = Fields(read_json(file), file)
    try:
        cfg = {"tokenizer": tokenizer} | family.read(fields)
    except CheckpointError:
        raise
    except (TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, ValueError) as e:
        name = culprit(family, fields)
        what = "" if name is None else f": {name} is {fields.data[name]!r}"
        raise CheckpointError(
            f"{file}: describes no {family.model_type} model{what} ({type(e).__name__}: {e}). Correct the file."
        ) from e
    fields.done()
    if "max_length" not in cfg and fields.data.get("max_position_embeddings") is not None:
        # no field of the family's, but where it stands, every library takes it for the window
        cfg["max_length"] = fields.take("max_position_embeddings")
    layers = cfg["layers"]
    if deepest is not None and isinstance(layers, list) and len(layers) > 4 * deepest + 8:
        raise CheckpointError(
            f"{file}: asks for {len(layers)} blocks, and the files hold {deepest} layers. They do not belong together."
        )
    return cfg


def config_of(folder: str | Path) -> Any:
    """The config of a saved folder, in any format that ``zoo.load`` reads; no weights are looked at."""
    return read_config(detect(Path(folder)), Path(folder))


def stored_dtype(folder: str | Path) -> torch.dtype | None:
    """The floating-point dtype that most weights of a saved folder have; ``None`` if no safetensors file holds any. Reads headers alone."""
    sizes: Counter[torch.dtype] = Counter()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open_regular(file) as handle:
            for _, tensor in stored_in(file, handle):
                if isinstance(tensor.dtype, torch.dtype) and tensor.dtype in READABLE:
                    sizes[tensor.dtype] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else None
