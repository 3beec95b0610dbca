"""Parts of timm that need none of its other parts: its package imports torchvision, and these need NumPy, torch and Pillow alone."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

__all__ = ["timm_part"]


@functools.cache
def timm_part(name: str) -> Any:
    """Return a module of ``timm.data``: ``mixup``, ``random_erasing`` or ``auto_augment``, read from its file.

    Raises:
        ModuleNotFoundError: timm is not installed, or has no such file any more.
    """
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "No module named 'timm', which has mixup, cutmix, random erasing and RandAugment. Install it with: pip install timm",
            name="timm",
        )
    file = Path(next(iter(found.submodule_search_locations)), "data", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"timm_{name}", file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(
            f"timm has no {file} in this version. Install another: pip install 'timm<2'", name="timm"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
