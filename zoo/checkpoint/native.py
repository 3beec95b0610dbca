"""The zoo's own folder: ``model.safetensors``, ``config.yaml``, and what transformers needs to read the same folder.

Nothing is initialised and then overwritten: the model is built on the meta device and every tensor goes from the file to its place,
on the target device and in the target dtype.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ...layers.base import Mixer
from ...layers.common import weight_dtype
from ..config import block_specs, validate
from ..lm import CausalLM
from ..registry import nearest
from ..tokenizer import tokenizer_files
from .files import CheckpointError, read_json, stored_tensors

__all__ = ["CheckpointError", "assign", "fp32_names", "hf_config", "load", "save", "unique_tensors"]

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"

# read by transformers where the package was not imported first (trust_remote_code)
_REMOTE_CODE = '''"""Lets transformers' Auto classes read this folder with trust_remote_code=True; needs `pip install hybridzoo[hf]`."""

from hybridzoo.zoo.hf import HybridZooConfig, HybridZooForCausalLM

__all__ = ["HybridZooConfig", "HybridZooForCausalLM"]
'''


def save(model: CausalLM, folder: str | os.PathLike[str]) -> Path:
    """Write a model so that ``zoo.load`` and transformers' ``AutoModelForCausalLM`` can read it.

    Every file is written beside its place and moved there when it is complete; other files of the folder are left alone.

    Args:
        model: A :class:`CausalLM`, or the transformers adapter around one.
        folder: Created if missing.

    Returns:
        The folder.
    """
    core = getattr(model, "core", model)
    if not isinstance(core, CausalLM):
        raise ValueError(f"save: expected a CausalLM or its transformers adapter, got {type(model).__name__}.")
    if any(hasattr(p, "full_tensor") for p in core.parameters()):
        raise ValueError(_SHARDED)
    described = {name: p.shape for name, p in unique_tensors(CausalLM(core.cfg, device="meta")).items()}
    odd = sorted(
        {name for name, p in unique_tensors(core).items() if described.pop(name, None) != p.shape} | {*described}
    )
    if odd:
        raise ValueError(
            f"save: {len(odd)} tensors differ from what the config describes, such as {odd[0]!r}. Undo what was put into the model; "
            "adapters of PEFT are merged by merge_and_unload(), or saved by their own save_pretrained."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {
        WEIGHTS: to_bytes(
            {k: v.detach().cpu().contiguous() for k, v in unique_tensors(core).items()}, {"format": "pt"}
        ),
        CONFIG: OmegaConf.to_yaml(core.cfg).encode(),
        "config.json": _json(hf_config(core)),
        "modeling_hybridzoo.py": _REMOTE_CODE.encode(),
    }
    if core.cfg.tokenizer == "byte":
        files |= {name: _json(content) for name, content in tokenizer_files().items()}
    with contextlib.ExitStack() as stack:
        # all complete before the first one is moved: an interruption leaves the old set or, for an instant, a mixture of whole files
        ready = [(stack.enter_context(_beside(folder, content)), folder / name) for name, content in files.items()]
        for temporary, place in ready:
            os.replace(temporary, place)
    return folder


_SHARDED = (
    "save: the parameters are sharded over processes, and one cannot write what others hold. Gather them on every process, state = "
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of torch.distributed.checkpoint."
    "state_dict; on one, load that into zoo.build(model.cfg), and save it."
)


def load(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> CausalLM:
    """Read a model that :func:`save`, or transformers' ``save_pretrained`` on the adapter, has written.

    Args:
        folder: The folder.
        device: Where the weights go; the CPU by default.
        dtype: What they are cast to; by default they stay as stored. Parameters that must be float32 are.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: A file is missing or damaged, or its tensors do not fit the config.
        ConfigError: The config is not valid.
    """
    folder = Path(folder)
    cfg, stored = _read_config(folder), stored_tensors(folder)
    _check_size(cfg, stored, folder)
    model = CausalLM(cfg, device="meta")
    expected, pinned = unique_tensors(model), fp32_names(model)
    target = torch.device("cpu" if device is None else device)
    for name, tensor in stored.items():
        if name not in expected:
            if model.cfg.tie_embeddings and name == "lm_head.weight":
                continue
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} is not part of the model.{nearest(name, expected)} Check that {CONFIG} belongs to it."
            )
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, the config makes it {tuple(expected[name].shape)}. "
                f"Check that {CONFIG} belongs to it."
            )
    if missing := set(expected) - set(stored):
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(expected)} tensors are missing, such as {min(missing)!r}. The file is not complete."
        )
    for name in expected:
        value = stored[name].read()
        to = dtype or value.dtype
        assign(model, name, moved(value, target, torch.promote_types(to, torch.float32) if name in pinned else to))
    return model.eval()


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


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on a device and in a precision, always in memory of its own: what a file gives may be a mapping of it."""
    new = tensor.to(device=device, dtype=dtype)
    return (new.clone() if new.data_ptr() == tensor.data_ptr() else new).contiguous()


def fp32_names(model: nn.Module) -> set[str]:
    """Parameters that stay float32 in a half-precision model, by their full names."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Mixer)
        for name in module.fp32_parameters
    }


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, those shared by several modules once, under their first name."""
    return dict(model.named_parameters())


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter ``name``, in every module that shares it."""
    old = model.get_parameter(name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is old:
                setattr(module, key, new)


def hf_config(model: CausalLM) -> dict[str, Any]:
    """The ``config.json`` under which transformers knows the model."""
    return {
        "model_type": "hybridzoo",
        "architectures": ["HybridZooForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_hybridzoo.HybridZooConfig",
            "AutoModelForCausalLM": "modeling_hybridzoo.HybridZooForCausalLM",
        },
        "zoo": OmegaConf.to_container(model.cfg),
        "dtype": str(weight_dtype(model.lm_head) or weight_dtype(model)).removeprefix("torch."),
    }


def _read_config(folder: Path) -> Any:
    own, foreign = folder / CONFIG, folder / "config.json"
    if own.exists():
        return validate(own)
    if not foreign.exists():
        raise CheckpointError(
            f"{folder}: holds neither {CONFIG} nor config.json. Pass a folder that zoo.save has written."
        )
    content = read_json(foreign)
    if content.get("model_type") != "hybridzoo":
        kind = content.get("model_type")
        raise CheckpointError(
            f"{foreign}: model_type is {kind!r}, not 'hybridzoo'. Use zoo.load, which knows other families."
        )
    return validate(content.get("zoo"), saved=True)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def _beside(folder: Path, content: bytes) -> Iterator[str]:
    # not of tempfile, whose files are for their owner alone
    temporary = str(folder / f".saving-{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
