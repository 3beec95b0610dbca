"""A ``config.json`` of another library, field by field; and tables of fields, read in both directions."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, nearest

__all__ = ["Fields", "Table", "lowest", "used", "written", "written_lowest"]

# written by transformers' base class, or about text and not about the network; max_position_embeddings bounds no computation here
_COMMON = frozenset(
    "architectures auto_map model_type _name_or_path name_or_path transformers_version dtype torch_dtype use_cache "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id output_attentions output_hidden_states "
    "return_dict chunk_size_feed_forward is_encoder_decoder is_decoder problem_type attention_dropout hidden_dropout "
    "initializer_range id2label label2id tokenizer_class attn_implementation _attn_implementation "
    "_attn_implementation_autoset use_mamba_kernels use_mambapy use_falcon_mambapy use_associative_scan "
    "output_router_logits router_aux_loss_coef router_jitter_noise num_logits_to_keep calc_logits_for_entire_prompt "
    "rescale_prenorm_residual pretraining_tp max_position_embeddings time_step_init_scheme".split()
)
_REQUIRED = object()
# no step size that small shows in float32, and a class that takes its logarithm must not meet a zero
_NO_STEP = 1e-30
# counts that lists are made from; more of them is a slip or an attack, and must not cost memory
_MOST = dict.fromkeys(("num_hidden_layers", "n_layer", "num_local_experts", "num_experts", "n_routed_experts"), 10_000)
# our option: the field of theirs, its default, and older names of it
Table = Mapping[str, tuple[Any, ...]]


class Fields:
    """A ``config.json`` from which every field is taken once: what nobody took is unknown, and an error."""

    def __init__(self, data: dict[str, Any], file: Path):
        self.data, self.file = data, file
        self.known: set[str] = set(_COMMON)

    def error(self, text: str) -> CheckpointError:
        """An error about the file, to be raised."""
        return CheckpointError(f"{self.file}: {text}")

    def wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        """An error about the value of a field, to be raised."""
        return self.error(f"{name} is {value!r}, expected {expected}. Correct the file.")

    def take(self, name: str, default: Any = _REQUIRED, *older: str) -> Any:
        """Return a field, or its default where the file has none; its type must be the default's.

        ``older`` names are accepted too, and must not contradict it. A ``null`` is none where the default is ``None``; elsewhere
        transformers' classes do not fill it in, so that nobody can say what it means, and it is refused.
        """
        self.known |= {name, *older}
        given = {key: self.data[key] for key in (name, *older) if key in self.data}
        if len({repr(value) for value in given.values()}) > 1:
            both = " and ".join(f"{key} {value!r}" for key, value in given.items())
            raise self.error(f"holds both {both}. Remove one of them.")
        value = next(iter(given.values()), None)
        if value is None:
            if default is _REQUIRED:
                raise self.error(f"{name} is missing. The file is not complete.")
            if given and default is not None:
                raise self.error(f"{next(iter(given))} is null, which is no value. Correct the file.")
            return default
        kind = int if default is _REQUIRED or default is None else type(default)
        if kind is float:
            value = _number(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise self.wrong(name, value, kind.__name__)
        if isinstance(value, int) and not -1 <= value <= _MOST.get(name, 2**31):
            raise self.error(f"{name} is {value}, beyond any size. The file is damaged or hostile.")
        return value

    def raw(self, name: str, default: Any = None) -> Any:
        """Return a field of any type, or a default where the file has none or a ``null``."""
        self.known.add(name)
        value = self.data.get(name)
        return default if value is None else value

    def nullable(self, name: str, default: int | None) -> Any:
        """Return a size that has a default where the file leaves it out, and is none where it is ``null``."""
        value = self.take(name, None)
        return value if name in self.data else default

    def automatic(self, name: str, default: int) -> int:
        """Return a size that has a default where the file leaves it out or says ``"auto"``."""
        self.known.add(name)
        return default if self.data.get(name, "auto") == "auto" else self.take(name)

    def kinds(self, table: Mapping[str, Any], default: list[str], *names: str) -> list[Any]:
        """Return a list of words, or a text of letters, each as a table has it; several names may not contradict each other."""
        given = {name: words for name in names if (words := self.raw(name)) is not None}
        for name, words in given.items():
            if not isinstance(words, list | str) or not all(isinstance(word, str) and word in table for word in words):
                raise self.wrong(name, words, f"a list of {', '.join(table)}")
        read = [[table[word] for word in words] for words in given.values()]
        if any(kinds != read[0] for kinds in read):
            raise self.error(f"{', '.join(given)} contradict each other. Remove the wrong ones.")
        return read[0] if read else [table[word] for word in default]

    def options(self, table: "Table") -> dict[str, Any]:
        """Return our options, each from the field that a table names for it."""
        return {option: self.take(*field) for option, field in table.items()}

    def floats(self, name: str, default: tuple[float, ...]) -> list[float]:
        """Return a list of numbers as long as the default."""
        values = self.raw(name, list(default))
        numbers = [_number(v) for v in values] if isinstance(values, list) else []
        if len(numbers) != len(default) or not all(isinstance(v, float) and not math.isnan(v) for v in numbers):
            raise self.wrong(name, values, f"{len(default)} numbers")
        return numbers

    def expect(self, name: str, *values: Any) -> Any:
        """Return a field that must have one of these values; absent, it is the first."""
        value = self.raw(name, values[0])
        if value not in values:
            only = " or ".join(map(repr, values))
            raise self.error(f"{name} is {value!r}; only {only} can be computed by this version.")
        return value

    def skip(self, *names: str) -> None:
        """Pass over fields that follow from others, or decide nothing."""
        self.known |= set(names)

    def follows(self, name: str, value: Any) -> None:
        """Check a field that may be left out, and otherwise must be what follows from others."""
        self.known.add(name)
        if self.data.get(name, value) != value:
            raise self.error(f"{name} is {self.data[name]!r}, and {value!r} by the other fields. Correct the file.")

    def done(self) -> None:
        """Refuse fields that nobody took: they could change what the model computes."""
        if "quantization_config" in self.data:
            raise self.error("the weights are quantised, which this version does not read.")
        for name in self.data:
            if name not in self.known:
                hint = f"{nearest(name, self.known)} If it does not change what the model computes, remove it."
                raise self.error(f"unknown field {name!r}.{hint}")


def written(options: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The reverse of :meth:`Fields.options`; nothing if there is no such mixer."""
    return {field[0]: options[option] for option, field in table.items()} if options else {}


def lowest(fields: Fields, step: float, name: str = "time_step_limit") -> list[float]:
    """Return the limits of step sizes in the classes that take ``time_step_min`` for the lower one and read no other."""
    limits = fields.floats(name, (0.0, math.inf))
    if limits != [0.0, math.inf]:
        raise fields.error(
            f"{name} is {limits}, which transformers' class does not read: it limits step sizes by time_step_min, {step}. "
            f"Write the lower limit there, and remove {name}."
        )
    return [0.0 if step <= _NO_STEP else step, math.inf]


def written_lowest(limits: list[float]) -> dict[str, Any]:
    """The reverse of :func:`lowest`; what has an upper limit shows when the result is read back."""
    return {"time_step_min": limits[0] or _NO_STEP}


def used(mixers: dict[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    """Return those mixers that stand in a list of layers."""
    names = {word.partition("@")[0] for token in layers for word in token.split()}
    return {name: spec for name, spec in mixers.items() if name in names}


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
