"""Layer schemes of other libraries, read as our list of tokens.

**Sublayer or layer?** One of our tokens is one residual block: norm, one mixer, add. Megatron and Nemotron-H count the
same way (sublayers). mamba-ssm, Jamba and most ``layer_types`` count layers of a mixer *and* a feed-forward, two tokens
each; 52 layers of Nemotron are about 26 of Jamba. Every importer says which it reads. Indices are 0-based.
"""

from collections.abc import Mapping, Sequence

from ..errors import ConfigError, nearest
from .pattern import MAX_BLOCKS

__all__ = ["from_attn_layer_idx", "from_jamba", "from_layer_types", "from_megatron"]

_MEGATRON = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
_MEGATRON_OTHER = {"G": "Gated DeltaNet", "D": "DeepSeek sparse attention", "+": "multi-head latent attention"}

# Hugging Face's names, those of transformers 5 and those before it
_LAYER_TYPES = {
    "mamba": "mamba2",
    "mamba2": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
    "sliding_attention": "sliding_attention",
    "mlp": "mlp",
    "dense": "mlp",
    "moe": "moe",
    "sparse": "moe",
}


def from_attn_layer_idx(
    n_layer: int,
    attn_layer_idx: Sequence[int],
    ssm: str = "mamba2",
    attention: str = "attention",
    mlp: str | None = None,
) -> list[str]:
    """mamba-ssm's ``attn_layer_idx``: attention at these indices, an SSM elsewhere. Counts layers.

    Args:
        n_layer: Layers; with ``mlp``, each is two tokens.
        attn_layer_idx: Indices of the attention layers.
        ssm: Name of the other mixers.
        attention: Name of the attention mixer.
        mlp: Name of the feed-forward after every mixer, for models with ``d_intermediate > 0``; ``None`` for none.
    """
    _count("n_layer", n_layer)
    for i in attn_layer_idx:
        if not 0 <= i < n_layer:
            raise ConfigError(
                f"attn_layer_idx: layer {i} is out of range. There are {n_layer} layers: use 0 to {n_layer - 1}."
            )
    mixers = [attention if i in attn_layer_idx else ssm for i in range(n_layer)]
    return mixers if mlp is None else [token for mixer in mixers for token in (mixer, mlp)]


def from_megatron(pattern: str, names: Mapping[str, str] | None = None) -> list[str]:
    """Megatron's ``--hybrid-layer-pattern``, Nemotron-H's ``hybrid_override_pattern``: ``M-M*-E``. Counts sublayers.

    ``M`` is Mamba-2, ``*`` attention, ``-`` an MLP, ``E`` a mixture of experts. Pipeline marks ``|`` mean nothing.

    Args:
        pattern: One character per residual block.
        names: Our names for characters, over ``{"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}``.

    Raises:
        ConfigError: A character without a name, or a ``/`` suffix.
    """
    known = {**_MEGATRON, **(names or {})}
    tokens = []
    for column, character in enumerate(pattern, 1):
        if character in known:
            tokens.append(known[character])
        elif character == "/":
            raise ConfigError(
                f"megatron: column {column}: '/' begins the multi-token-prediction layers, no part of the trunk."
                f" Leave out {pattern[column - 1 :]!r}."
            )
        elif character != "|":
            meaning = f" ({_MEGATRON_OTHER[character]})" if character in _MEGATRON_OTHER else ""
            raise ConfigError(
                f"megatron: column {column}: character {character!r}{meaning} has no name."
                f" Pass names={{{character!r}: 'a mixer'}}. Known: {' '.join(known)}."
            )
    _count("megatron", len(tokens))
    return tokens


def from_jamba(
    n_layer: int = 32,
    attn_layer_period: int = 8,
    attn_layer_offset: int = 4,
    expert_layer_period: int = 2,
    expert_layer_offset: int = 1,
    num_experts: int = 16,
    *,
    mamba: str = "mamba",
    attention: str = "attention",
    mlp: str = "mlp",
    moe: str = "moe",
) -> list[str]:
    """Jamba's periods and offsets (arXiv:2403.19887), defaults those of Jamba v0.1. Counts layers: two tokens each.

    Args:
        n_layer: Layers.
        attn_layer_period: Layer ``i`` has attention where ``i % period == offset``, Mamba elsewhere.
        attn_layer_offset: See there; smaller than the period.
        expert_layer_period: Layer ``i`` has experts where ``i % period == offset``, an MLP elsewhere.
        expert_layer_offset: See there; smaller than the period.
        num_experts: With 1, every feed-forward is an MLP.
        mamba: Name of the Mamba mixer.
        attention: Name of the attention mixer.
        mlp: Name of the dense feed-forward.
        moe: Name of the mixture of experts.
    """
    _count("n_layer", n_layer)
    for track, period, offset in (
        ("attn", attn_layer_period, attn_layer_offset),
        ("expert", expert_layer_period, expert_layer_offset),
    ):
        if period < 1 or not 0 <= offset < period:
            raise ConfigError(
                f"{track}_layer_offset: is {offset}, with {track}_layer_period = {period}. Use 0 to period - 1."
            )
    tokens = []
    for i in range(n_layer):
        experts = num_experts > 1 and i % expert_layer_period == expert_layer_offset
        tokens += [attention if i % attn_layer_period == attn_layer_offset else mamba, moe if experts else mlp]
    return tokens


def from_layer_types(
    layer_types: Sequence[str],
    mlp_layer_types: Sequence[str] | str | None = None,
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Hugging Face's ``layer_types``. Counts layers if ``mlp_layer_types`` is given, else sublayers, as Nemotron-H.

    Args:
        layer_types: ``mamba``, ``linear_attention``, ``attention``, ``full_attention``, ``sliding_attention``, ``mlp``,
            ``moe``.
        mlp_layer_types: The feed-forward after each, ``dense`` or ``sparse``, as a list; one text is the same for all.
        names: Our names for layer types. Without, the first two are ``mamba2``, the next two ``attention``, and the
            others keep their names, with ``mlp`` for ``dense`` and ``moe`` for ``sparse``.

    Raises:
        ConfigError: A type without a name, or lists of different lengths.
    """
    known = {**_LAYER_TYPES, **(names or {})}

    def name(kind: str, where: str) -> str:
        if kind not in known:
            raise ConfigError(
                f"{where}: unknown layer type {kind!r}.{nearest(kind, known)} Pass names={{{kind!r}: 'a mixer'}}."
            )
        return known[kind]

    _count("layer_types", len(layer_types))
    mixers = [name(kind, f"layer_types[{i}]") for i, kind in enumerate(layer_types)]
    if mlp_layer_types is None:
        return mixers
    after = [mlp_layer_types] * len(mixers) if isinstance(mlp_layer_types, str) else list(mlp_layer_types)
    if len(after) != len(mixers):
        raise ConfigError(
            f"mlp_layer_types: has {len(after)} entries, layer_types has {len(mixers)}. They need the same number."
        )
    feed_forwards = [name(kind, f"mlp_layer_types[{i}]") for i, kind in enumerate(after)]
    return [token for pair in zip(mixers, feed_forwards, strict=True) for token in pair]


def _count(where: str, n: int) -> None:
    if not 0 < n <= MAX_BLOCKS:
        raise ConfigError(f"{where}: {n} layers. Use 1 to {MAX_BLOCKS}.")
