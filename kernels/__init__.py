"""Ops and their backends: tensors in, tensors out, nothing of modules, YAML or transformers."""

# ops stand in dispatch's tables, and so in what ``zoo doctor`` prints, in the order of these imports
# isort: off
from .dispatch import BackendError
from .scan.op import selective_scan
from .ssd.op import ssd
from .conv.op import causal_conv1d
from .loss.op import cross_entropy
from .step.op import causal_conv1d_update, conv_ssd_update, selective_state_update, ssd_state_update
from .norm.op import branch_layer_norm, branch_rms_norm, layer_norm, rms_norm
from .norm.gated import gated_rms_norm
from .seq import Seq
from .step.inputs import ScanNorms
from .few.inputs import StepConv, StepNorm
from .few.op import step_linear
from .attend.inputs import HeadNorm
from .attend.op import read_attention, step_attention
from . import mamba_layer as mamba_layer
from . import mamba2_layer as mamba2_layer
# isort: on

__all__ = [
    "BackendError",
    "HeadNorm",
    "ScanNorms",
    "Seq",
    "StepConv",
    "StepNorm",
    "branch_layer_norm",
    "branch_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "conv_ssd_update",
    "cross_entropy",
    "gated_rms_norm",
    "layer_norm",
    "read_attention",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
    "step_attention",
    "step_linear",
]
