"""Interchangeable layers, one idea per file: modules for anybody's network, and the mixers of the zoo's models."""

from .attention import Attention, AttentionState
from .base import Mixer, Seq, State, copy_state, map_state, nbytes_of
from .conv import CausalConv1d
from .conv2d import GatedConv2d
from .mamba import Mamba, MambaState
from .mamba2 import Mamba2, Mamba2State
from .mlp import MLP
from .moe import MoE
from .norm import GatedRMSNorm, RMSNorm, make_norm
from .options import OptionError
from .reverse_complement import ReverseComplement, StrandEmbedding, StrandHead, reverse_complement
from .ss2d import SS2D
from .ss2d2 import SS2D2

__all__ = [
    "MLP",
    "SS2D",
    "SS2D2",
    "Attention",
    "AttentionState",
    "CausalConv1d",
    "GatedConv2d",
    "GatedRMSNorm",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "Mixer",
    "MoE",
    "OptionError",
    "RMSNorm",
    "ReverseComplement",
    "Seq",
    "State",
    "StrandEmbedding",
    "StrandHead",
    "copy_state",
    "make_norm",
    "map_state",
    "nbytes_of",
    "reverse_complement",
]
