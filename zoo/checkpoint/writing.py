"""Write a model in another library's format, and convert folders from one format to another."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...layers.common import weight_dtype
from ..errors import CheckpointError
from ..layout import expand, split_token
from ..models.causal_lm import CausalLM, padded_vocab
from ..models.model import Model
from . import native
from .families import FAMILIES
from .family import Family
from .fields import Fields
from .files import SPECIAL_IDS, dump, open_source
from .keys import View
from .publish import GENERATION, check_new, new_folder
from .reading import load, shape_of
from .tensors import stored_tensors

__all__ = ["Report", "convert", "export"]

FORMATS = ("hf", "mamba_ssm", "hybridzoo")
_SHARD = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of :func:`convert`.

    Attributes:
        source: Format that was read: ``hybridzoo`` or a ``model_type``.
        target: Format that was written, likewise.
        tensors: Parameters of the model, shared ones once.
        parameters: Numbers in them.
        pattern: The model's layers.
        files: What the new folder holds.
        left_out: Stored tensors that are not taken: copies of a tied head, tables, layers that nobody loads.
    """

    source: str
    target: str
    tensors: int
    parameters: int
    pattern: str
    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        some = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        left_out = f"\nleft out {len(self.left_out)} that the model does not need: {some}" if self.left_out else ""
        return (
            f"{self.source} -> {self.target}: all {self.tensors} tensors matched, {self.parameters:,} parameters, "
            f"layers {self.pattern}{left_out}\nwrote {', '.join(self.files)}"
        )


def convert(source: str | os.PathLike[str], folder: str | os.PathLike[str], to: str = "hf") -> Report:
    """Read a model in any format, and write it in another.

    Args:
        source: As for ``zoo.load``.
        folder: A new folder.
        to: As for :func:`export`. Tokenizer files, generation settings and the ids of special tokens are copied along.

    Raises:
        CheckpointError: As ``zoo.load`` and :func:`export`; no folder is left behind then.
    """
    _check_format(to)
    # before the weights are read, which may take minutes
    check_new(Path(folder))
    place = open_source(source)
    model = load(source)
    with new_folder(Path(folder)) as new:
        target = _write(model, new, to)
        files = tuple(sorted(p.name for p in new.iterdir()))
    with stored_tensors(place) as stored:
        names = frozenset(stored)
    taken = FAMILIES[model.family].pieces(View(model, names)).keys() if model.family else names
    return Report(
        source=model.family or "hybridzoo", target=target, tensors=sum(1 for _ in model.parameters()),
        parameters=model.num_params(), pattern=model.cfg.layers, files=files, left_out=tuple(sorted(names - taken)),
    )  # fmt: skip


def export(model: Model, folder: str | os.PathLike[str], to: str = "hf") -> str:
    """Write a model so that another library can read it; the tensors are bit for bit the model's.

    Args:
        model: A model, or the transformers adapter around one.
        folder: A new or empty folder; it appears when it is complete.
        to: ``"hf"``, the family of transformers that has this architecture; ``"mamba_ssm"``; or ``"hybridzoo"``, as ``zoo.save``.

    Returns:
        The ``model_type`` that was written, or ``"mamba_ssm"`` or ``"hybridzoo"``.

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
    dtype: Any = weight_dtype(model.head)
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
