"""A folder in any format that the zoo knows becomes a model.

The format is told by ``config.json``: its ``model_type`` is ours or one of transformers', and one with ``d_model`` and ``n_layer`` is
mamba-ssm's. The model is built on the meta device, names and shapes of all stored tensors are checked
against it, and only then are values read, tensor by tensor onto the target device and into the target precision.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...layers.moe import Router
from ..config.resolve import Resolved, block_specs
from ..errors import CheckpointError, ConfigError, nearest
from ..models.model import Model
from ..models.tasks import task_of
from . import native
from .blame import in_words_of_file
from .family import Family, Pieces
from .fields import Fields
from .files import read_json, read_metadata
from .inspect import detect, read_config
from .keys import Piece, View, layer_count
from .publish import steady
from .report import LoadReport
from .tensors import READABLE, Stored, check_one_set, stored_tensors

__all__ = ["checked", "fill", "load_folder", "one_precision", "shape_of"]

EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def load_folder(
    folder: Path, source: str | os.PathLike[str], *, device: torch.device, dtype: torch.dtype | None = None
) -> Any:
    """Read the model in a folder, which ``source`` names; the rest is as for :func:`~.loading.load`."""
    with contextlib.ExitStack() as files:

        def opened() -> tuple[Family, Any, dict[str, Stored], dict[str, dict[str, Any]]]:
            files.close()  # those of an attempt that somebody's save has interrupted
            family = detect(folder)
            if family is None:
                check_one_set(folder)
            stored = files.enter_context(stored_tensors(folder))
            cfg = read_config(family, folder, tokenizer=str(source), deepest=layer_count(frozenset(stored)))
            return family or Own(), cfg, stored, read_metadata(folder)

        family, cfg, stored, metadata = steady(folder, opened)
        model, pieces = _matched(family, cfg, stored, folder)
        if dtype is None:
            dtype = one_precision(model, pieces, stored, folder)
        fill(model, pieces, stored, device, dtype)
    # absolute: its tokenizer may be asked for when the process is in another folder
    model.source, model.metadata = folder.absolute(), metadata
    model.family = None if isinstance(family, Own) else family.model_type
    left_out = tuple(sorted(stored.keys() - pieces.keys()))
    model.load_report = LoadReport(str(folder), family.model_type, matched=tuple(pieces), unexpected=left_out)
    return model.eval()


class Own(Family):
    """The zoo's own folders, whose names are the model's."""

    model_type = "hybridzoo"
    ignored = r"(?!)"

    def keys(self, view: View) -> Iterator[Piece]:
        """Every tensor is itself."""
        for name in view.shapes:
            yield Piece(name, name)


def _matched(family: Family, cfg: Any, stored: dict[str, Stored], folder: Path) -> tuple[Model, Pieces]:
    """The model on the meta device, and what of the files goes where.

    A head of its own is the head, whatever the config says of it: so do transformers and PEFT leave a model whose head was trained.
    """
    if isinstance(family, Own):
        _check_size(cfg, stored, folder)
    try:
        model = task_of(cfg)(cfg, device="meta")
    except ConfigError as e:
        if isinstance(family, Own):
            raise
        fields = Fields(read_json(folder / "config.json"), folder / "config.json")
        what = in_words_of_file(str(e), family, fields, family.read(fields))
        raise CheckpointError(f"{fields.file}: describes no model that works: {what}") from e
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    view = View(model, shapes)
    if model.cfg.get("tie_embeddings") and HEAD in stored:
        table = next(piece.theirs for piece in family.keys(view) if piece.ours == EMBEDDING)
        if table in stored and not _equal(stored[table], stored[HEAD]):
            model.cfg.tie_embeddings = False
            model = type(model)(Resolved(model.cfg, model.specs), device="meta")
            view = View(model, shapes)
    return model, checked(view, family, stored, folder)


def _check_size(cfg: Any, stored: dict[str, Any], folder: Path) -> None:
    # a pattern of some bytes stands for thousands of blocks, which would take long to build only to find them missing
    own: dict[str | int, int] = {}
    for spec in block_specs(cfg):
        adapted = any(part.get("adapter_rank") for _, part, _ in spec.parts)
        own[spec.index if adapted or not spec.label else spec.label] = 1 + len(spec.parts)
    if sum(own.values()) > 2 * len(stored) + 64:
        raise CheckpointError(
            f"{folder}: the config describes {len(own)} blocks, and {len(stored)} tensors are stored; many are missing. The file is not "
            "complete, or the config is another's."
        )


def _equal(a: Stored, b: Stored) -> bool:
    if a.shape != b.shape:
        return False
    table, head = _floating(a, EMBEDDING).read(), _floating(b, HEAD).read()
    both = torch.promote_types(table.dtype, head.dtype)
    return torch.equal(table.to(both), head.to(both))


def _floating(tensor: Stored, name: str) -> Stored:
    if tensor.dtype not in READABLE:
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r} holds {tensor.dtype}, expected floating-point numbers: float64, float32, float16 or bfloat16."
        )
    return tensor


def one_precision(model: Model, pieces: Pieces, stored: dict[str, Stored], folder: Path) -> torch.dtype | None:
    """Choose the precision of weights that are stored in several; ``None`` if they are of one, as layers need them.

    Apart are those that are kept in float32 anyway, and routers, which compute in a precision of their own.
    """
    apart = native.fp32_names(model) | {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Router)}
    # what is no floating type was refused before
    kinds: set[Any] = {stored[name].dtype for name, group in pieces.items() if any(p.ours not in apart for p in group)}
    if len(kinds) <= 1:
        return None
    file = folder / "config.json"
    config = read_json(file) if file.exists() else {}
    stated = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    for kind in kinds:
        if stated == str(kind).removeprefix("torch."):
            return kind
    return functools.reduce(torch.promote_types, kinds)


def checked(view: View, family: Family, stored: dict[str, Stored], folder: Path) -> Pieces:
    """The pieces by stored tensor, once everything that the model needs is known to be there in the right shape."""
    pieces = family.pieces(view)
    for name in pieces:
        if name not in stored:
            raise CheckpointError(
                f"{folder}: tensor {name!r} is missing. The files are not complete, or {family.told_by} is another's."
            )
    ignored = re.compile(family.ignored)
    for name, tensor in stored.items():
        if name not in pieces:
            if ignored.fullmatch(name) or (view.cfg.get("tie_embeddings") and name == HEAD):
                continue  # a tied head that is stored too is equal
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} is not part of the model.{nearest(name, pieces)} Check that {family.told_by} belongs "
                "to it."
            )
        expected, config = shape_of(view, pieces[name]), "the config" if isinstance(family, Own) else family.told_by
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, {config} makes it {expected}. Check that it belongs to it."
            )
        _floating(tensor, name)
    return pieces


def shape_of(view: View, pieces: Iterable[Piece]) -> tuple[int, ...]:
    """The shape of the tensor of theirs that these pieces make up."""
    shape: list[int] = []
    for piece in pieces:
        part = [*torch.empty(view.shapes[piece.ours], device="meta")[piece.at].shape]
        for dim, cut in enumerate(piece.of):
            part[dim] = max(part[dim], cut.stop or 0)
        shape = [max(a, b) for a, b in zip(shape or part, part, strict=True)]
    return tuple(shape)


def fill(
    model: Model, pieces: Pieces, stored: dict[str, Stored], device: torch.device, dtype: torch.dtype | None
) -> None:
    """Read the stored tensors into a model on the meta device, each into its places, onto a device and in a precision."""
    pinned = native.fp32_names(model)
    # which tensor of theirs is the first to fill a place; a family may store what is shared more than once
    filled: dict[tuple[str, str], str] = {}
    for name, group in pieces.items():
        source = stored[name].read()
        for piece in group:
            to = dtype or source.dtype
            to = torch.promote_types(to, torch.float32) if piece.ours in pinned else to
            parameter = model.get_parameter(piece.ours)
            first = filled.setdefault((piece.ours, str(piece.at)), name)
            if first != name:
                if not torch.equal(parameter[piece.at], source[piece.of].to(device=device, dtype=to)):
                    raise CheckpointError(
                        f"{stored[name].file}: tensors {first!r} and {name!r} differ, and the model shares them. Make them equal."
                    )
            elif not piece.at and not piece.of:
                # memory of its own, also where two parameters have one tensor
                native.assign(model, piece.ours, (source if len(group) == 1 else source.clone()).to(device, to))
            else:
                if parameter.is_meta:
                    native.assign(model, piece.ours, torch.empty(parameter.shape, device=device, dtype=to))
                model.get_parameter(piece.ours).data[piece.at] = source[piece.of].to(device=device, dtype=to)
