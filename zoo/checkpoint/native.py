"""The zoo's own folder: ``model.safetensors``, ``config.yaml``, and what transformers needs to read the same folder."""

import copy
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from ...layers.base import Mixer
from ...layers.common import weight_dtype
from ..config.files import read_config as read_yaml
from ..config.resolve import validate
from ..errors import CheckpointError, shortened
from ..models.model import Model
from ..models.tasks import task_of
from ..tokenizer import BUILT_IN, tokenizer_files, tokenizer_folder
from .files import SPECIAL_IDS, dump, open_regular, read_json
from .publish import GENERATION, publishing, write_whole
from .tensors import READABLE

__all__ = ["as_it_is", "as_saved", "assign", "fp32_names", "hf_config", "read_config", "save", "superseded"]

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.yaml", "preprocessor_config.json"
# a tokenizer's files are one set, which is written whole or left alone
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")

# read by transformers where the package was not imported first (trust_remote_code)
_REMOTE_CODE = '''"""Lets transformers' Auto classes read this folder with trust_remote_code=True; needs `pip install hybridzoo[hf]`."""

from hybridzoo.zoo.hf import {names}

__all__ = [{quoted}]
'''


def save(model: Model, folder: str | os.PathLike[str]) -> Path:
    """Write a model so that ``zoo.load`` and transformers' Auto classes can read it.

    All files take their places at once: a save that is interrupted, at whatever moment, leaves the model that was there or the new one.
    Weights of the model that was there go; files of other kinds are left alone. The tokenizer's files and what is known about generating
    come along from where the model was loaded.

    Args:
        model: A model, or the transformers adapter around one.
        folder: Created if missing.

    Returns:
        The folder.

    Raises:
        ValueError: The model is not what its config describes, its weights are not floating-point numbers in memory, or the folder
            holds an adapter of PEFT, which transformers would put on top of the model.
    """
    core = as_saved(model)
    folder = Path(folder)
    if (adapter := folder / "adapter_config.json").exists():
        raise ValueError(
            f"save: {adapter} makes transformers put an adapter on whatever model lies beside it. Choose another folder, or remove it."
        )
    with publishing(folder, lambda new: superseded(folder, new)) as place:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in core.named_parameters()}, place / WEIGHTS, {"format": "pt"}
        )
        (place / "config.json").write_text(dump(hf_config(core)), encoding="utf-8")
        write_config(core.cfg, place)
        write_companions(core, place, folder)
    return folder


def superseded(folder: Path, new: set[str]) -> Iterable[str]:
    """Files of a folder that belong to the model that was there before, given the names of the new model's."""
    if WEIGHTS not in new and f"{WEIGHTS}.index.json" not in new:
        return ()  # no model, but an adapter's own files, say
    old = {p.name for p in folder.iterdir() if _WEIGHTS.fullmatch(p.name) or p.name == GENERATION}
    old |= {PROCESSOR}
    return old | set(TOKENIZER if new & set(TOKENIZER) else ())


def as_saved(model: Any) -> Model:
    """The core of a model, or of transformers' adapter around one, with what is so in config and metadata; raises as :func:`save`."""
    adapted = getattr(model, "core", None)
    core = as_it_is(model if adapted is None else adapted)
    core.backbone.follow_owners()
    tensors = dict(core.named_parameters())
    if any(hasattr(p, "full_tensor") for p in tensors.values()):
        raise ValueError(
            "save: the parameters are sharded over processes, and one cannot write what others hold. Gather them on every process, state = "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of torch.distributed.checkpoint."
            "state_dict; on one, load that into zoo.build(model.cfg), and save it."
        )
    described = {name: p.shape for name, p in type(core)(core.cfg, device="meta").named_parameters()}
    odd = sorted({name for name, p in tensors.items() if described.pop(name, None) != p.shape} | {*described})
    if odd:
        raise ValueError(
            f"save: {len(odd)} tensors differ from what the config describes, such as {odd[0]!r}. Undo what was put into the model; "
            "adapters of PEFT are merged by merge_and_unload(), or saved by their own save_pretrained."
        )
    for name, p in tensors.items():
        if p.is_meta or p.dtype not in READABLE:
            what = "has no values (it is on the meta device)" if p.is_meta else f"holds {p.dtype}"
            raise ValueError(
                f"save: tensor {name!r} {what}, which cannot be loaded. Save the model in a floating-point precision."
            )
    if adapted is not None:
        core = with_metadata(core, known_about_text(model))
        if core.source is None and Path(model.name_or_path or "-").is_dir():
            core.source = Path(model.name_or_path)
    return core


def as_it_is(model: Model) -> Model:
    """The model under a config that says of the head what is so: a head that was trained on its own is not tied, whatever was meant."""
    if not isinstance(model, Model):
        raise ValueError(f"save: expected a model of the zoo or its transformers adapter, got {type(model).__name__}.")
    table, head = (getattr(part, "weight", None) for part in (model.backbone.embedding, model.head))
    if not model.may_tie or not isinstance(table, Tensor) or not isinstance(head, Tensor):
        return model
    meant = model.cfg.tie_embeddings
    may_equal = meant and head.shape == table.shape and not head.is_meta
    tied = head is table or (may_equal and torch.equal(head, table.to(head)))
    if tied == meant and (not tied or head is table):
        return model
    model = copy.copy(model)
    model.cfg = copy.deepcopy(model.cfg)
    model.cfg.tie_embeddings = tied
    if tied and head is not table:
        own: Any = copy.copy(model.head)
        own._parameters = {**own._parameters, "weight": table}
        model._modules = {**model._modules, model.head_name: own}
    return model


def with_metadata(model: Model, metadata: dict[str, dict[str, Any]]) -> Model:
    """The same model, with other metadata."""
    model = copy.copy(model)
    model.metadata = metadata
    return model


def known_about_text(adapter: Any) -> dict[str, dict[str, Any]]:
    """The metadata of a model that is in transformers' hands, whose configs may have been changed there."""
    before = adapter.core.metadata
    ids = {name: getattr(adapter.config, name, None) for name in SPECIAL_IDS}
    ids = {name: value for name, value in ids.items() if value is not None or name in before.get("config.json", {})}
    if getattr(adapter, "generation_config", None) is None:
        return {"config.json": ids} if ids else {}
    generation = adapter.generation_config.to_diff_dict()
    for name in {"transformers_version", "_from_model_config"} - before.get(GENERATION, {}).keys():
        generation.pop(name, None)
    # what merely follows from the ids needs no file
    said = GENERATION in before or any(ids.get(name) != value for name, value in generation.items())
    return {"config.json": ids} | ({GENERATION: generation} if said else {})


def write_config(cfg: DictConfig, place: Path) -> None:
    """Write what people read, and what transformers runs where the package was not imported first."""
    cls = task_of(cfg)
    classes = cls.auto_classes(cfg).values()
    code = _REMOTE_CODE.format(names=", ".join(classes), quoted=", ".join(f'"{name}"' for name in classes))
    write_whole(place / CONFIG, OmegaConf.to_yaml(cfg))
    if classes:
        write_whole(place / "modeling_hybridzoo.py", code)
    for name, content in cls.companions(cfg).items():
        write_whole(place / name, dump(content))


def write_companions(model: Model, place: Path, target: Path) -> None:
    """The tokenizer's files and those about generating, for a model whose folder shall be ``target``."""
    if "tokenizer" not in model.cfg:
        return
    source, built_in = model.source, model.cfg.tokenizer in BUILT_IN
    at = tokenizer_folder(model.cfg.tokenizer, source)
    files = [name for name in TOKENIZER if at is not None and (at / name).is_file()]
    if source is not None and not source.is_dir() and not built_in:
        warnings.warn(
            f"{source}: the folder that the model was loaded from is gone, so no tokenizer's files are saved with it. Save them by the "
            "tokenizer's own save_pretrained.",
            stacklevel=3,
        )
    if files and at is not None and not (target.exists() and at.samefile(target)):
        for name in files:
            shutil.copyfile(at / name, place / name)
    elif built_in and not files:
        for name, content in tokenizer_files(model.cfg.tokenizer).items():
            (place / name).write_text(dump(content), encoding="utf-8")
    if generation := model.metadata.get(GENERATION):
        (place / GENERATION).write_text(dump(generation), encoding="utf-8")


def fp32_names(model: nn.Module) -> set[str]:
    """Parameters that stay float32 in a half-precision model, by their full names."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Mixer)
        for name in module.fp32_parameters
    }


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter ``name``, in every module that shares it."""
    old = model.get_parameter(name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is old:
                setattr(module, key, new)


def hf_config(model: Model) -> dict[str, Any]:
    """The ``config.json`` under which transformers knows the model."""
    config: dict[str, Any] = {"model_type": "hybridzoo"}
    if model.hf_class is not None:
        config["architectures"] = [model.hf_class]
        classes = model.auto_classes(model.cfg)
        config["auto_map"] = {auto: f"modeling_hybridzoo.{name}" for auto, name in classes.items()}
    if names := model.cfg.get("labels"):
        config |= {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    return config | {
        **model.metadata.get("config.json", {}),
        "zoo": OmegaConf.to_container(model.cfg),
        "dtype": str(weight_dtype(model.head) or weight_dtype(model)).removeprefix("torch."),
    }


def read_config(folder: Path) -> DictConfig:
    """The config of one of our folders: the ``zoo`` part of ``config.json``, which transformers reads too, or else ``config.yaml``.

    Which of them somebody has edited, and which is left over, is not for us to guess: a ``CheckpointError`` if they differ.
    """
    twin, file = folder / CONFIG, folder / "config.json"
    if twin.exists():
        open_regular(twin).close()  # a pipe would be waited for
    if not file.exists():
        return validate(twin)
    cfg = validate(read_json(file).get("zoo"), saved=True)
    if not twin.exists() or read_yaml(twin) == OmegaConf.to_container(cfg):
        return cfg
    if (other := validate(twin)) != cfg:  # neither comments nor what is said by leaving it out make a difference
        key = next(str(key) for key in other if other[key] != cfg[key])
        copied, counts = (shortened(dict(config)[key]) for config in (other, cfg))
        raise CheckpointError(
            f"{twin}: says {key}: {copied}, and {file.name} {counts}. The latter (zoo) is what counts, for "
            f"zoo.load and for transformers; {CONFIG} is its copy. Make the change in both, or remove {CONFIG} if it is not what you mean."
        )
    return cfg
