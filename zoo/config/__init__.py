"""Configs: found, read safely, merged, checked, resolved."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .resolve import load_config, validate
    from .schema import ConfigSchema, NormSchema
    from .shipped import list_models
    from .specs import block_specs

__all__ = ["ConfigSchema", "NormSchema", "block_specs", "list_models", "load_config", "validate"]
__getattr__, __dir__ = lazily(
    __name__,
    ConfigSchema="schema",
    NormSchema="schema",
    block_specs="specs",
    list_models="shipped",
    load_config="resolve",
    validate="resolve",
)
