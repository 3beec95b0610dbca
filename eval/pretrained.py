"""From what a user names to a model, its tokenizer and a device, for evaluation."""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from lm_eval.models.utils import resolve_max_length
from lm_eval.models.utils_hf import get_dtype
from transformers import PreTrainedTokenizerBase

from ..zoo.checkpoint import CheckpointError, load
from ..zoo.checkpoint.files import open_source
from ..zoo.checkpoint.inspect import detect
from ..zoo.config.resolve import list_models
from ..zoo.device import pick_device
from ..zoo.errors import nearest
from ..zoo.hf import HybridZooForCausalLM, byte_tokenizer
from ..zoo.hub import unreachable
from ..zoo.models.build import build
from ..zoo.models.model import Model
from ..zoo.models.tasks import check_language_model
from ..zoo.tokenizer import BUILT_IN, from_transformers, whose

__all__ = ["explained", "fingerprint", "open_model", "open_tokenizer", "quiet", "reachable", "usable_device", "window"]


def usable_device(device: str | None, named: bool) -> str | None:
    """A device that exists, and this rank's own GPU where none was chosen.

    lm-eval's command line says ``"cuda:0"`` where the user said nothing, so that this one becomes the CPU where there is no GPU, with a
    warning. A model that is not ``named``, but given as an object, stays where it is, unless asked for.
    """
    if device is None and not named:
        return None
    if device == "cuda:0" and not torch.cuda.is_available():
        warnings.warn("device='cuda:0': torch sees no GPU, so the model is evaluated on the CPU.", stacklevel=3)
        return "cpu"
    chosen = pick_device(device)
    if chosen.type == "cuda" and device in (None, "cuda", "cuda:0"):
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return str(chosen)


def open_model(
    pretrained: Any, dtype: Any = "auto", device: str | None = None, seed: int = 0
) -> tuple[Any, Path | None]:
    """The model that ``pretrained`` stands for, as transformers knows it, and the folder it came from.

    There is no model if only transformers can read it. Arguments are those of :class:`~.harness.HybridZooLM`.

    Raises:
        CheckpointError: A folder without a config, or one that cannot be loaded.
        SourceError: The model is no language model.
    """
    if isinstance(pretrained, Model):
        pretrained = _wrapped(pretrained, type(pretrained).__name__)
    if isinstance(pretrained, torch.nn.Module):
        return (pretrained.to(device) if device else pretrained), None
    cast = None if dtype in (None, "auto") else get_dtype(dtype)
    name, path = str(pretrained), Path(pretrained)
    if name in list_models() or (path.suffix in (".yaml", ".yml") and path.is_file()):
        warnings.warn(
            f"pretrained={name}: is a config, so its model is built untrained and the scores only show that evaluation "
            "runs. Pass a folder of trained weights to measure them.",
            stacklevel=3,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _wrapped(build(name, device=device, dtype=cast), name), None
    try:
        folder = open_source(name)
        detect(folder)
    except CheckpointError:
        if path.is_dir() and not any((path / f"{part}config.json").exists() for part in ("", "adapter_")):
            raise  # nobody's model: ours is the better message
        # a family that the zoo does not know, or no such folder: transformers knows, or says why not
        return None, None
    return _wrapped(load(folder, device=device, dtype=cast), name), folder


def _wrapped(model: Model, name: str) -> HybridZooForCausalLM:
    check_language_model(model, f"pretrained={name}")
    return HybridZooForCausalLM.wrap(model)


def reachable(name: str, revision: str | None = None) -> str:
    """Return a name that transformers can load without waiting for a hub that does not answer: it, or the folder of its last download.

    Raises:
        OSError: There is no such folder, the hub does not answer, and nothing was downloaded.
    """
    if Path(name).exists() or (why := unreachable()) is None:
        return name
    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as e:
        raise OSError(f"it was not downloaded before, and {why}") from e


def window(folder: Path | None, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The window that lm-eval uses for the model in a folder of another library; ``None`` where ours states one.

    Not every such folder states it, and scores are comparable only where it is the same.
    """
    if folder is None or detect(folder) is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return resolve_max_length(SimpleNamespace(**config), tokenizer)


def open_tokenizer(tokenizer: Any, model: Any, folder: Path | None, add_bos_token: bool | None = None) -> Any:
    """The tokenizer as an object, or ``None`` if it comes with a model of transformers.

    ``model`` and ``folder`` are what :func:`open_model` returned; a tokenizer there goes before what the config says.
    """
    if tokenizer is None and isinstance(model, HybridZooForCausalLM):
        tokenizer = whose(model.core.cfg.tokenizer, folder or model.core.source)
    if isinstance(tokenizer, str) and tokenizer in BUILT_IN:
        name, tokenizer = tokenizer, byte_tokenizer(tokenizer)
        tokenizer.name_or_path = name
    elif isinstance(tokenizer, str):
        tokenizer = from_transformers(tokenizer)
    if tokenizer is not None and add_bos_token is not None and getattr(tokenizer, "add_bos_token", None) is not None:
        tokenizer.add_bos_token = add_bos_token
    return tokenizer


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence loggers below errors: HFLM warns of every model given as an object, and of a type that it does not know."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def explained(pretrained: Any) -> Iterator[None]:
    """Say in the zoo's words why transformers cannot load what ``pretrained`` names.

    Raises:
        ValueError: In place of transformers' OSError, and of its call for ``trust_remote_code``.
    """
    try:
        yield
    except OSError as e:
        first = str(e).splitlines()[0]
        raise ValueError(
            f"pretrained={pretrained}: is neither a folder nor a config, and transformers cannot load it ({first})."
            f"{nearest(pretrained, list_models())} See `zoo list` for the configs."
        ) from e
    except ValueError as e:
        if "trust_remote_code" not in str(e):
            raise
        raise ValueError(
            f"pretrained={pretrained}: is of a family that the zoo does not know, and needs code of its own, which is run for those alone "
            "who pass trust_remote_code=True to lm-eval."
        ) from e


def fingerprint(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of all that a model's answers depend on: weights, config, tokenizer and settings."""
    facts = [_config_facts(model.config), _tokenizer_facts(tokenizer), settings]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _config_facts(config: Any) -> dict:
    facts = getattr(config, "zoo", None) or config.to_dict()
    return {k: v for k, v in facts.items() if k not in ("_name_or_path", "transformers_version")}


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> list:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, table, tokenizer.special_tokens_map]
