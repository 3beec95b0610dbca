"""One converter per family; the order is the one in which an export tries them: the plainer first, then what has more options."""

# isort: off
from . import llama, qwen, smollm3, phi3, granite
from . import bamba, falcon_h1, jamba, mamba, mamba2, mamba_ssm, nemotron_h, zamba2

# isort: on

__all__ = [
    "bamba", "falcon_h1", "granite", "jamba", "llama", "mamba", "mamba2", "mamba_ssm", "nemotron_h", "phi3", "qwen", "smollm3", "zamba2",
]  # fmt: skip
