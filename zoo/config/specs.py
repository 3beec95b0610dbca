"""The blocks of a config: the pattern and the table of mixers, put together."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, nearest
from ..layout import READS, WRITES, BlockSpec, split_token
from ..layout.pattern import MAX_BLOCKS
from ..registry import check_mixer_options, get_mixer, list_mixers
from .stages import Stage, stages_of

__all__ = ["STREAMS", "block_specs", "specs_of", "without_streams"]

# what an entry of `mixers` may say besides the mixer's own options; the first of each is the default
STREAMS = {"reads": READS, "writes": WRITES}
# each costs a check of its own
_MAX_EXCEPTIONS = 256


def block_specs(cfg: Any) -> list[BlockSpec]:
    """Return the residual blocks of a resolved config: those that a model has under ``specs``."""
    data: Any = OmegaConf.to_container(cfg) if isinstance(cfg, DictConfig) else cfg
    return specs_of(stages_of(data), data)


def specs_of(stages: list[Stage], data: Mapping[str, Any]) -> list[BlockSpec]:
    """Return the residual blocks of a config whose ``mixers`` are complete, exceptions from ``override`` applied."""
    mixers = data["mixers"]
    # blocks of one mixer have one table of options, of which exceptions make others
    options = {name: without_streams(entry) for name, entry in mixers.items()}
    specs: list[BlockSpec] = []
    for number, stage in enumerate(stages):
        for token in stage.tokens:
            index, (names, label) = len(specs), split_token(token)
            for name in names:
                if name not in mixers:
                    hint = f" Add mixers.{name}: {{type: {name}}}." if name in list_mixers() else nearest(name, mixers)
                    known = ", ".join(mixers) or "nothing"
                    raise ConfigError(
                        f"{stage.where}: unknown mixer {name!r} in block {index}.{hint} Under mixers: {known}."
                    )
            parts = [(name, options[name], f"mixers.{name}") for name in names]
            place: dict[str, Any] = {"d_model": stage.d_model, "stage": number, **_streams(names, mixers)}
            specs.append(BlockSpec(index, token, label, parts, **place))
    for number in range(len(stages)):
        _check_streams([spec for spec in specs if spec.stage == number])
    _set_drops(specs, data.get("drop_path") or 0.0)
    exceptions = data.get("override") or []
    if len(exceptions) > _MAX_EXCEPTIONS:
        raise ConfigError(
            f"override: has {len(exceptions)} entries, more than {_MAX_EXCEPTIONS}. Let one entry name several blocks."
        )
    named = 0
    for i, exception in enumerate(exceptions):
        named += _apply_exception(specs, exception, f"override.{i}")
        if named > MAX_BLOCKS:
            raise ConfigError(
                f"override: names more than {MAX_BLOCKS} blocks in all. Change the mixers' own options instead."
            )
    first: dict[str, BlockSpec] = {}
    for spec in specs:
        twin = first.setdefault(spec.label, spec) if spec.label else spec
        joined = (
            f"layers: label {spec.label!r} joins blocks {twin.index} ({twin.token}) and {spec.index} ({spec.token})"
        )
        if [part[:2] for part in twin.parts] != [part[:2] for part in spec.parts]:
            raise ConfigError(
                f"{joined}, whose mixers or options differ. Use two labels, or override every block of the label alike."
            )
        if twin.d_model != spec.d_model:
            raise ConfigError(f"{joined}, which have {twin.d_model} and {spec.d_model} channels. Use two labels.")
    return specs


def _set_drops(specs: list[BlockSpec], rate: float) -> None:
    """Let stochastic depth grow from 0 to ``rate``, in equal steps; what mixes channels alone goes with the block before it."""
    if not rate:
        return
    depths, depth = [], -1
    for spec in specs:
        depth += any(get_mixer(part["type"], where).cls.mixes_tokens for _, part, where in spec.parts)
        depths.append(max(depth, 0))
    for spec, depth in zip(specs, depths, strict=True):
        spec.drop = rate * depth / max(1, depths[-1])


def without_streams(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of ``mixers`` without what is the block's and not the mixer's."""
    return {key: value for key, value in entry.items() if key not in STREAMS}


def _streams(names: list[str], mixers: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key, choices in STREAMS.items():
        values = {mixers[name].get(key, choices[0]): name for name in names}
        if len(values) > 1:
            given = " and ".join(f"mixers.{name}.{key} = {value}" for value, name in values.items())
            raise ConfigError(f"layers: {'+'.join(names)} stand side by side, but {given}. Make them equal.")
        found[key] = next(iter(values))
    return found


def _check_streams(specs: list[BlockSpec]) -> None:
    first = next((i for i, spec in enumerate(specs) if spec.writes == "side"), len(specs))
    for spec in specs[: first + 1]:
        if spec.reads in ("side", "residual_plus_side"):
            raise ConfigError(
                f"{spec.parts[0][2]}.reads: block {spec.index} ({spec.token}) reads the side stream, which no earlier block writes. "
                "Put a block with writes: side before it."
            )


def _apply_exception(specs: list[BlockSpec], exception: Any, where: str) -> int:
    if not isinstance(exception, Mapping) or set(exception) != {"at", "set"}:
        raise ConfigError(
            f"{where}: found {exception!r}, expected {{at: block index or list of them, set: {{option: value}}}}."
        )
    at, options = exception["at"], exception["set"]
    at = at if isinstance(at, list | tuple) else [at]
    n = len(specs)
    if not at or not all(type(i) is int for i in at):
        raise ConfigError(
            f"{where}.at: found {exception['at']!r}, expected a block index or a list of them, such as [0, -1]."
        )
    if len(at) > MAX_BLOCKS:
        raise ConfigError(f"{where}.at: has {len(at)} indices, and there are {n} blocks. Name each of them once.")
    if not isinstance(options, Mapping) or not options:
        raise ConfigError(f"{where}.set: found {options!r}, expected options, such as {{d_state: 128}}.")
    known: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for index in at:
        if not -n <= index < n:
            raise ConfigError(f"{where}.at: block {index} is out of range, there are {n} blocks. Use {-n} to {n - 1}.")
        _except(specs[index], options, where, known)
    return len(at)


def _except(spec: BlockSpec, options: Mapping[str, Any], where: str, known: dict[int, Any]) -> None:
    # `known` has what each table of options becomes, with the table itself, which keeps its id its own
    for key in options:
        if key == "type" or not any(key in part for _, part, _ in spec.parts):
            names = sorted({k for _, part, _ in spec.parts for k in part if k != "type"})
            raise ConfigError(
                f"{where}.set.{key}: is no option of block {spec.index} ({spec.token}).{nearest(key, names)}"
                f" Options: {', '.join(names)}."
            )
    for i, (name, part, _) in enumerate(spec.parts):
        if mine := {k: v for k, v in options.items() if k in part}:
            if id(part) not in known:
                known[id(part)] = part, check_mixer_options({**part, **mine}, f"{where}.set")
            spec.parts[i] = (name, known[id(part)][1], f"{where}.set")
