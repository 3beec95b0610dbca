"""One converter per published format."""

from ..family import Family, FileFamily
from .bamba import Bamba
from .falcon_h1 import FalconH1
from .granite import Granite, GraniteHybrid, GraniteMoe
from .jamba import Jamba
from .llama import Llama, Mistral, Mixtral
from .mamba import FalconMamba, Mamba, Mamba2
from .mamba_ssm import MambaSSM
from .nemotron_h import NemotronH
from .phi3 import Phi3
from .qwen import Qwen2, Qwen3, Qwen3Moe
from .smollm3 import SmolLM3
from .typeseg import TypeSeg
from .vim import Vim
from .vmamba import VMamba
from .zamba2 import Zamba2

__all__ = ["FAMILIES", "FILE_FAMILIES"]

_CONVERTERS: tuple[type[Family], ...] = (
    Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3Moe, SmolLM3, Phi3, Granite, GraniteMoe, GraniteHybrid,
    Bamba, FalconH1, Jamba, Mamba, FalconMamba, Mamba2, MambaSSM, NemotronH, Zamba2,
)  # fmt: skip
# by model_type, in the order in which an export tries them: the plainer first, then what has more options
FAMILIES: dict[str, Family] = {cls.model_type: cls() for cls in _CONVERTERS}
# of files that no config.json lies beside; told by the names of their tensors
FILE_FAMILIES: dict[str, FileFamily] = {"vmamba": VMamba(), "vim": Vim(), "typeseg": TypeSeg()}
