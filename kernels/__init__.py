"""Ops and their backends: tensors in, tensors out, nothing of modules, YAML or transformers."""

from .conv.op import causal_conv1d
from .dispatch import BackendError
from .loss.op import cross_entropy
from .norm.op import branch_rms_norm, rms_norm
from .scan.op import selective_scan
from .seq import Seq
from .ssd.op import ssd
from .step.op import causal_conv1d_update, conv_ssd_update, selective_state_update, ssd_state_update

__all__ = [
    "BackendError",
    "Seq",
    "branch_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "conv_ssd_update",
    "cross_entropy",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
]
