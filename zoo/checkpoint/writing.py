"""Write a model in another library's format, and convert folders from one format to another."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...layers.common import weight_dtype
from ..config.plain import first_line
from ..config.stages import pattern_of
from ..errors import CheckpointError
from ..layout import expand, split_token
from ..models.causal_lm import CausalLM
from ..models.model import Model
from ..models.tasks import task_of
from ..models.text import padded_vocab
from . import native
from .families import FAMILIES, FILE_FAMILIES
from .family import Family, FileFamily, Shapes
from .fields import Fields
from .files import SPECIAL_IDS, dump
from .keys import View
from .loading import STRUCTURE, load
from .publish import GENERATION, check_new, new_folder
from .reading import shape_of
from .report import LoadReport, Report

__all__ = ["convert", "export"]

FORMATS = ("hf", "mamba_ssm", "hybridzoo", *(name for name, family in FILE_FAMILIES.items() if family.is_written))
_SHARD = 5 * 10**9


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    to: str | None = None,
    *,
    config: Any = None,
    weights: str | None = None,
) -> Report:
    """Read a model in any format, and write it in another.

    Args:
        source: As for ``zoo.load``.
        folder: A new folder.
        to: As for :func:`export`; by default ``"hf"`` for a language model, and ``"hybridzoo"`` for any other. Tokenizer files, generation
            settings and the ids of special tokens are copied along.
        config: As for ``zoo.load``, where the source is a file of weights.
        weights: Likewise.

    Raises:
        CheckpointError: As ``zoo.load`` and :func:`export`; no folder is left behind then.
    """
    if to is not None:
        _check_format(to)
    # before the weights are read, which may take minutes
    check_new(Path(folder))
    model = load(source, config=config, weights=weights)
    with new_folder(Path(folder)) as new:
        target = _write(model, new, to or ("hf" if isinstance(model, CausalLM) else "hybridzoo"))
        files = tuple(sorted(p.name for p in new.iterdir()))
    read: LoadReport = model.load_report
    return Report(
        source=model.family or "hybridzoo", target=target, tensors=sum(1 for _ in model.parameters()),
        parameters=model.num_params(), pattern=pattern_of(model.cfg), files=files, left_out=read.unexpected, part=read.part,
    )  # fmt: skip


def export(model: Model, folder: str | os.PathLike[str], to: str = "hf") -> str:
    """Write a model so that another library can read it; the tensors are bit for bit the model's.

    Args:
        model: A model, or the transformers adapter around one.
        folder: A new or empty folder; it appears when it is complete.
        to: ``"hf"``, the family of transformers that has this architecture; ``"mamba_ssm"``; ``"vmamba"`` or ``"vim"``, a file
            ``model.pth`` that these projects' code reads, under the key ``model``; or ``"hybridzoo"``, as ``zoo.save``.

    Returns:
        The ``model_type`` that was written, or the format.

    Raises:
        CheckpointError: The format cannot express the model, or the folder is not empty.
    """
    _check_format(to)
    with new_folder(Path(folder)) as place:
        return _write(model, place, to)


def _write(model: Model, place: Path, to: str) -> str:
    if to == "hybridzoo":
        native.save(model, place)
        return to
    model = native.as_saved(model)
    view = View(model)
    if to in FILE_FAMILIES:
        file_family = FILE_FAMILIES[to]
        _check_expressed(view, file_family)
        torch.save({"model": dict(_theirs(view, file_family, model))}, place / "model.pth")
        return to
    if not isinstance(model, CausalLM):
        raise CheckpointError(
            f"to={to!r}: is for language models, and this one's task is {model.task!r}. Use to='hybridzoo'."
        )
    family, config = _expressed(view, to, model.family)
    tensors = _theirs(view, family, model)
    if to == "mamba_ssm":
        content = dict(tensors)
        if model.cfg.tie_embeddings:
            content["lm_head.weight"] = content["backbone.embedding.weight"]
        torch.save(content, place / "pytorch_model.bin")
    else:
        _write_shards(tensors, place)
        # other tokenizers bring their own; the byte tokenizer is known to us alone
        special = dict.fromkeys(SPECIAL_IDS, 0) if model.cfg.tokenizer == "byte" else {}
        config |= special | model.metadata.get("config.json", {}) | {
            "model_type": family.model_type, "architectures": [family.architecture],
            "dtype": str(weight_dtype(model.head)).removeprefix("torch."),
        }  # fmt: skip
    # mamba-ssm's reader knows no tags, and no fields but its own
    (place / "config.json").write_text(dump(config, sort=True, tagged=to != "mamba_ssm"), encoding="utf-8")
    if to == "mamba_ssm" and (ids := model.metadata.get("config.json")):
        model = native.with_metadata(model, {GENERATION: ids | model.metadata.get(GENERATION, {})})
    native.write_companions(model, place, place)
    return family.model_type


def _check_format(to: str) -> None:
    if to not in FORMATS:
        raise CheckpointError(f"to: unknown format {to!r}. Known: {', '.join(FORMATS)}.")


def _expressed(view: View, to: str, first: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The first family whose config, read back, is the same model; ``first`` is tried before the others."""
    unlike: list[str] = []
    reasons: dict[str, str] = {}
    tried = [name for name in FAMILIES if (name == "mamba_ssm") == (to == "mamba_ssm")]
    for name in sorted(tried, key=lambda name: name != first):
        family = FAMILIES[name]
        try:
            config = family.write(view)
            if view.cfg.max_length is None:
                config.pop("max_position_embeddings", None)  # a null is no way to say that nothing is stated
            cfg = family.read(Fields(config, Path("config.json")))
            if _types(cfg) != view.layout:
                continue  # known before a model is built from it
            back = View(CausalLM({"tokenizer": "byte"} | cfg, device="meta"))
        except CheckpointError as e:
            # what the family's reader refuses by name
            reasons[name] = str(e).removeprefix("config.json: ")
            continue
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            # what the family cannot express shows as a part that is not there or a value that nobody may have
            continue
        if signature(back) == signature(view):
            return family, config
        options = differing(signature(back), signature(view))
        unlike = options if not unlike or len(options) < len(unlike) else unlike
    none = "mamba-ssm cannot" if to == "mamba_ssm" else f"no family of {', '.join(tried)} can"
    closest = f" The closest differs in {', '.join(unlike)}." if unlike else ""
    if first in reasons:
        closest = f" {first}: {reasons[first]}"
    raise CheckpointError(
        f"to={to!r}: {none} express the layers {view.cfg.layers!r} with their options.{closest} "
        "Use to='hybridzoo', which transformers reads through AutoModelForCausalLM."
    )


def _check_expressed(view: View, family: FileFamily) -> None:
    """Refuse a model that would be another one when its file is read again."""
    name = family.model_type
    try:
        shapes = {theirs: shape_of(view, group) for theirs, group in family.pieces(view).items()}
        found = family.find(Shapes(shapes, Path("model.pth")))
        back = View(task_of(found)(found, device="meta"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(
            f"to={name!r}: {name} has no such layers as {pattern_of(view.cfg)!r} ({first_line(e)}). Use to='hybridzoo'."
        ) from e
    mine, other = image_signature(view), image_signature(back)
    if mine != other:
        raise CheckpointError(
            f"to={name!r}: a file of {name} says nothing of {', '.join(differing(other, mine))}, and would be another model. Use "
            "to='hybridzoo'."
        )


def _types(cfg: dict[str, Any]) -> list[str]:
    return ["+".join(cfg["mixers"][name]["type"] for name in split_token(token)[0]) for token in expand(cfg["layers"])]


def signature(view: View) -> dict[str, Any]:
    """Everything of a model that decides what it computes."""
    cfg = view.cfg
    # a divisor in a file is a factor here, and comes back with another rounding
    plain = {str(key): float(f"{cfg[key]:.12g}") for key in cfg if str(key).endswith("_multiplier")}
    return plain | {
        "blocks": [[(part.type, part.options) for part in block] for block in view.blocks],
        "streams": view.streams, "sharing": view.source,
        "norm": (cfg.norm.type, cfg.norm.eps), "d_model": cfg.d_model, "vocab": padded_vocab(cfg),
        "tied": cfg.tie_embeddings, "residual_in_fp32": cfg.residual_in_fp32,
    }  # fmt: skip


def image_signature(view: View) -> dict[str, Any]:
    """Everything of an image model that decides what it computes."""
    return {
        "blocks": [[(part.type, part.options) for part in block] for block in view.blocks], "shapes": view.shapes,
        "streams": view.streams, "sharing": view.source,
    } | {key: view.cfg.get(key) for key in STRUCTURE if key not in ("layers", "stages", "mixers", "override")}  # fmt: skip


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """List what two signatures do not share: options by their names, in the order of ``b``."""
    found = dict.fromkeys(key for key in b if key != "blocks" and a.get(key) != b[key])
    for ours, theirs in zip(b["blocks"], a["blocks"], strict=False):
        for (_, mine), (_, other) in zip(ours, theirs, strict=False):
            found |= dict.fromkeys(key for key in mine if key not in other or other[key] != mine[key])
    return list(found)


def _theirs(view: View, family: Family, model: Model) -> Iterator[tuple[str, Tensor]]:
    parameters, seen = _as_stored(model), set()
    for name, group in family.pieces(view).items():
        whole = group[0]
        if len(group) == 1 and not whole.of:
            tensor = parameters[whole.ours].detach()[whole.at].cpu().contiguous()
            # what their file holds more than once must not be the same memory
            place = (whole.ours, str(whole.at))
            yield name, tensor.clone() if place in seen else tensor
            seen.add(place)
            continue
        tensor = torch.empty(shape_of(view, group), dtype=parameters[whole.ours].dtype)
        for piece in group:
            tensor[piece.of] = parameters[piece.ours].detach()[piece.at].cpu()
        yield name, tensor


def _as_stored(model: Model) -> dict[str, Tensor]:
    """The parameters; those kept in float32 in a half-precision model are in its precision where that loses nothing.

    So a half-precision checkpoint is written back as it was read, and decay rates that were trained further keep their digits.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    dtype: Any = weight_dtype(model.head) or weight_dtype(model)
    kinds: dict[str, list[str]] = {}
    for name in native.fp32_names(model) & parameters.keys():
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for names in kinds.values():
        cast = {name: parameters[name].detach().to(dtype) for name in names}
        if all(torch.equal(t.to(parameters[name].dtype), parameters[name]) for name, t in cast.items()):
            parameters |= cast
    return parameters


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(batch, folder / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and size + tensor.nbytes > _SHARD:
            flush()
            size = 0
        batch[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    index: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else native.WEIGHTS
        (folder / f"shard-{i}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = dump({"metadata": {"total_size": total}, "weight_map": index}, sort=True)
        (folder / f"{native.WEIGHTS}.index.json").write_text(content, encoding="utf-8")
