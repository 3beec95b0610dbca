"""Layer patterns: every way to write down which mixer stands where becomes one explicit list."""

from .expand import READS, WRITES, BlockSpec, allocate, expand
from .importers import from_attn_layer_idx, from_jamba, from_layer_types, from_megatron
from .pattern import compress, split_token

__all__ = [
    "READS",
    "WRITES",
    "BlockSpec",
    "allocate",
    "compress",
    "expand",
    "from_attn_layer_idx",
    "from_jamba",
    "from_layer_types",
    "from_megatron",
    "split_token",
]
