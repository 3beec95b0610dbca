"""``zoo.load``: a folder or hub id in any format that the zoo knows becomes a model.

The format is told by the folder's content: ``config.yaml`` is ours, a ``config.json`` with a ``model_type`` is transformers', one with
``d_model`` and ``n_layer`` is mamba-ssm's. The model is built on the meta device, names and shapes of all stored tensors are checked
against it, and only then are values read, tensor by tensor onto the target device and into the target precision.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..device import pick_device
from ..lm import CausalLM
from ..registry import ConfigError, nearest
from . import native
from .blame import culprit, in_words_of_file
from .family import Family, Fields, families
from .files import CheckpointError, Stored, open_source, read_json, read_metadata, stored_tensors
from .keys import Piece, View, layer_count

__all__ = ["detect", "load", "read_config"]


def load(
    source: str | os.PathLike[str], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> CausalLM:
    """Read a model that the zoo, transformers or mamba-ssm has written.

    Args:
        source: A folder, or a hub id such as ``"state-spaces/mamba-130m"`` (downloaded through huggingface_hub).
        device: Where the weights go; the CPU by default.
        dtype: What they are cast to; by default they stay as stored. Parameters that must be float32 are.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: A file is missing, damaged or hostile, its tensors do not fit the config, or the family is unknown.
        ConfigError: The config of one of our own folders is not valid.
        ValueError: The device is not there; nothing has been read or downloaded then.
    """
    device = pick_device("cpu" if device is None else device, meta=True)
    folder = open_source(source)
    model = _load(folder, str(source), device, dtype)
    model.source, model.metadata = folder, read_metadata(folder)
    return model


def _load(folder: Path, tokenizer: str, device: torch.device | str | None, dtype: torch.dtype | None) -> CausalLM:
    family = detect(folder)
    if family is None:
        return native.load(folder, device=device, dtype=dtype)
    stored = stored_tensors(folder)
    cfg = read_config(family, folder, tokenizer=tokenizer, deepest=layer_count(frozenset(stored)))
    try:
        model = CausalLM(cfg, device="meta")
    except ConfigError as e:
        fields = Fields(read_json(folder / "config.json"), folder / "config.json")
        what = in_words_of_file(str(e), family, fields, family.read(fields))
        raise CheckpointError(f"{folder / 'config.json'}: describes no model that works: {what}") from e
    model.family = family.model_type
    view = View(model, frozenset(stored))
    pieces = _checked(view, family, stored, folder)
    _fill(model, pieces, stored, device, dtype)
    return model.eval()


def detect(folder: Path) -> Family | None:
    """The converter for a folder; ``None`` if the folder is the zoo's own."""
    if (folder / native.CONFIG).exists():
        return None
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(
            f"{folder}: holds neither {native.CONFIG} nor config.json. Pass a folder that zoo.save, save_pretrained or mamba-ssm "
            "has written."
        )
    config, known = read_json(file), families()
    kind = config.get("model_type")
    if kind is None and "d_model" in config and "n_layer" in config:
        kind = "mamba_ssm"
    if kind == "hybridzoo":
        return None
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"{file}: model_type is {kind!r}, which the zoo does not know.{nearest(kind, known)} "
            f"Known: hybridzoo, {', '.join(sorted(known))}."
        )
    return known[kind]


def read_config(family: Family, folder: Path, tokenizer: str = "byte", deepest: int | None = None) -> dict[str, Any]:
    """Our config for the ``config.json`` in a folder.

    Args:
        family: Its converter.
        folder: The folder.
        tokenizer: What the config shall say; converters that know better overrule it.
        deepest: Layers that the stored tensors show; a config of many more is refused before it is built.
    """
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
    layers = cfg["layers"]
    if deepest is not None and isinstance(layers, list) and len(layers) > 4 * deepest + 8:
        raise CheckpointError(
            f"{file}: asks for {len(layers)} blocks, and the files hold {deepest} layers. They do not belong together."
        )
    return cfg


def _checked(view: View, family: Family, stored: dict[str, Stored], folder: Path) -> dict[str, list[Piece]]:
    """The pieces by stored tensor, once everything that the model needs is known to be there in the right shape."""
    pieces: dict[str, list[Piece]] = {}
    for piece in family.keys(view):
        if piece.theirs in stored:
            pieces.setdefault(piece.theirs, []).append(piece)
        else:
            raise CheckpointError(
                f"{folder}: tensor {piece.theirs!r} is missing. The files are not complete, or config.json is another's."
            )
    ignored = re.compile(family.ignored)
    for name, tensor in stored.items():
        if name not in pieces:
            if ignored.fullmatch(name) or (view.cfg.tie_embeddings and name == "lm_head.weight"):
                continue
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} is not part of the model.{nearest(name, pieces)} Check that config.json belongs to it."
            )
        expected = shape_of(view, pieces[name])
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, config.json makes it {expected}. Check that it belongs to it."
            )
    return pieces


def shape_of(view: View, pieces: Iterable[Piece]) -> tuple[int, ...]:
    """The shape of the tensor of theirs that these pieces make up."""
    shape: list[int] = []
    for piece in pieces:
        part = _indexed(view.shapes[piece.ours], piece.at)
        for dim, cut in enumerate(piece.of):
            part[dim] = max(part[dim], cut.stop or 0)
        shape = [max(a, b) for a, b in zip(shape or part, part, strict=True)]
    return tuple(shape)


def _indexed(shape: tuple[int, ...], index: tuple[slice | int, ...]) -> list[int]:
    sizes = []
    for dim, size in enumerate(shape):
        cut = index[dim] if dim < len(index) else slice(None)
        if isinstance(cut, slice):
            sizes.append(len(range(*cut.indices(size))))
    return sizes


def _fill(
    model: CausalLM,
    pieces: dict[str, list[Piece]],
    stored: dict[str, Stored],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    pinned = native.fp32_names(model)
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    started: dict[str, Tensor] = {}
    # which tensor of theirs is the first to fill a place; a family may store what is shared more than once
    filled: dict[tuple[str, str], str] = {}
    left: dict[str, set[str]] = {}
    for group in pieces.values():
        for piece in group:
            left.setdefault(piece.ours, set()).add(str(piece.at))
    for name, group in pieces.items():
        source = stored[name].read()
        if not source.is_floating_point():
            raise CheckpointError(
                f"{stored[name].file}: tensor {name!r} holds {source.dtype}, expected floating-point numbers."
            )
        for piece in group:
            to = dtype or source.dtype
            to = torch.promote_types(to, torch.float32) if piece.ours in pinned else to
            first = filled.setdefault((piece.ours, str(piece.at)), name)
            if first != name:
                so_far = started[piece.ours] if piece.ours in started else model.get_parameter(piece.ours)
                if not torch.equal(so_far[piece.at], source[piece.of].to(device=device, dtype=to)):
                    raise CheckpointError(
                        f"{stored[name].file}: tensors {first!r} and {name!r} differ, and the model shares them. Make them equal."
                    )
                continue
            if not piece.at and not piece.of:
                native.assign(model, piece.ours, native.moved(source, device, to))
                continue
            if piece.ours not in started:
                started[piece.ours] = torch.empty(parameters[piece.ours].shape, device=device, dtype=to)
            started[piece.ours][piece.at] = source[piece.of].to(device=device, dtype=to)
            left[piece.ours].remove(str(piece.at))
            if not left[piece.ours]:
                native.assign(model, piece.ours, started.pop(piece.ours))


def dump(content: dict[str, Any], tagged: bool = True) -> str:
    """JSON as transformers writes it, infinities included, or with plain ``Infinity``, as Python's own reader and writer have it."""
    return json.dumps(_plain(content) if tagged else content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value
