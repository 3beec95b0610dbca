"""Small configs of every family, and the models of each that are published: ``configs.yaml``, read."""

from pathlib import Path
from typing import Any

import yaml

__all__ = ["CONFIGS", "PUBLISHED", "SHARED", "VOCAB", "config_of"]

VOCAB = 61
_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SHARED: dict[str, dict[str, Any]] = _FILE["shared"]
# by name, the first part of transformers' class names and the options that are not its defaults
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (options.pop("class"), options) for name, options in _FILE["configs"].items()
}
PUBLISHED: dict[str, str] = _FILE["published"]


def config_of(name: str) -> Any:
    """Return transformers' config of an entry of :data:`CONFIGS`."""
    import transformers

    kind, options = CONFIGS[name]
    return getattr(transformers, f"{kind}Config")(**({"vocab_size": VOCAB, "pad_token_id": 0} | options))
