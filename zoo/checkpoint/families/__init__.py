"""One converter per family; the order is the one in which an export tries them."""

from . import bamba, falcon_h1, granite, jamba, llama, mamba, mamba2, mamba_ssm, nemotron_h, zamba2

__all__ = ["bamba", "falcon_h1", "granite", "jamba", "llama", "mamba", "mamba2", "mamba_ssm", "nemotron_h", "zamba2"]
