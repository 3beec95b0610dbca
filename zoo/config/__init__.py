"""Configs: found, read safely, merged, checked, resolved."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .files import find_config
    from .resolve import load_config, validate
    from .schema import ConfigSchema, NormSchema
    from .shipped import list_models
    from .specs import block_specs

__all__ = ["ConfigSchema", "NormSchema", "block_specs", "find_config", "list_models", "load_config", "validate"]
__getattr__, __dir__ = lazily(
    __name__,
    ConfigSchema="schema",
    NormSchema="schema",
    block_specs="specs",
    find_config="files",
    list_models="shipped",
    load_config="resolve",
    validate="resolve",
)
