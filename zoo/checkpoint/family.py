"""What a converter is, and the table of them.

A family is a way to write models down: a ``config.json`` and names for tensors. Its converter turns the config into ours
(:meth:`Family.read`), ours into theirs (:meth:`Family.write`), and lists which tensor is which (:meth:`Family.keys`). It imports
nothing of the library that the family comes from.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..registry import nearest
from .files import CheckpointError
from .keys import Piece, View

__all__ = ["Family", "Fields", "Table", "families", "lowest", "register", "written", "written_lowest"]

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
T = TypeVar("T", bound="type[Family]")


class Fields:
    """A ``config.json`` from which every field is taken once: what nobody took is unknown, and an error."""

    def __init__(self, data: dict[str, Any], file: Path):
        self.data, self.file = data, file
        self.known: set[str] = set(_COMMON)

    def take(self, name: str, default: Any = _REQUIRED, *older: str) -> Any:
        """A field, or its default where the file has none; its type must be the default's.

        ``older`` names are accepted too, and must not contradict it. A ``null`` is none where the default is ``None``; elsewhere
        transformers' classes do not fill it in, so that nobody can say what it means, and it is refused.
        """
        self.known |= {name, *older}
        given = {key: self.data[key] for key in (name, *older) if key in self.data}
        if len({repr(value) for value in given.values()}) > 1:
            both = " and ".join(f"{key} {value!r}" for key, value in given.items())
            raise CheckpointError(f"{self.file}: holds both {both}. Remove one of them.")
        value = next(iter(given.values()), None)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.file}: {name} is missing. The file is not complete.")
            if given and default is not None:
                raise CheckpointError(f"{self.file}: {next(iter(given))} is null, which is no value. Correct the file.")
            return default
        kind = int if default is _REQUIRED or default is None else type(default)
        if kind is float:
            value = _number(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise CheckpointError(f"{self.file}: {name} is {value!r}, expected {kind.__name__}. Correct the file.")
        if isinstance(value, int) and not -1 <= value <= _MOST.get(name, 2**31):
            raise CheckpointError(f"{self.file}: {name} is {value}, beyond any size. The file is damaged or hostile.")
        return value

    def nullable(self, name: str, default: int | None) -> Any:
        """A size that has a default where the file leaves it out, and is none where it is ``null``."""
        value = self.take(name, None)
        return value if name in self.data else default

    def kinds(self, table: Mapping[str, Any], default: list[str], *names: str) -> list[Any]:
        """A list of words, or a text of letters, each as a table has it; several names may not contradict each other."""
        self.known |= set(names)
        read: list[list[Any]] = []
        for name in names:
            words = self.data.get(name)
            if words is None:
                continue
            if not isinstance(words, list | str) or not all(isinstance(word, str) and word in table for word in words):
                raise CheckpointError(
                    f"{self.file}: {name} is {words!r}, expected a list of {', '.join(table)}. Correct the file."
                )
            read.append([table[word] for word in words])
        if any(kinds != read[0] for kinds in read):
            given = ", ".join(name for name in names if self.data.get(name) is not None)
            raise CheckpointError(f"{self.file}: {given} contradict each other. Remove the wrong ones.")
        return read[0] if read else [table[word] for word in default]

    def options(self, table: "Table") -> dict[str, Any]:
        """Our options, each from the field that a table names for it."""
        return {option: self.take(*field) for option, field in table.items()}

    def floats(self, name: str, default: tuple[float, ...]) -> list[float]:
        """A list of numbers as long as the default."""
        self.known.add(name)
        values = self.data.get(name)
        values = list(default) if values is None else values
        if not isinstance(values, list) or len(values) != len(default):
            raise CheckpointError(
                f"{self.file}: {name} is {values!r}, expected {len(default)} numbers. Correct the file."
            )
        numbers = [_number(v) for v in values]
        if not all(isinstance(v, float) and not math.isnan(v) for v in numbers):
            raise CheckpointError(
                f"{self.file}: {name} is {values!r}, expected {len(default)} numbers. Correct the file."
            )
        return numbers

    def expect(self, name: str, *values: Any) -> Any:
        """A field that must have one of these values; absent, it is the first."""
        self.known.add(name)
        value = self.data.get(name)
        value = values[0] if value is None else value
        if value not in values:
            only = " or ".join(map(repr, values))
            raise CheckpointError(f"{self.file}: {name} is {value!r}; only {only} can be computed by this version.")
        return value

    def skip(self, *names: str) -> None:
        """Fields that follow from others, or decide nothing."""
        self.known |= set(names)

    def follows(self, name: str, value: Any) -> None:
        """A field that may be left out, and otherwise must be what follows from others."""
        self.known.add(name)
        if self.data.get(name, value) != value:
            raise CheckpointError(
                f"{self.file}: {name} is {self.data[name]!r}, and {value!r} by the other fields. Correct the file."
            )

    def done(self) -> None:
        """Refuse fields that nobody took: they could change what the model computes."""
        if "quantization_config" in self.data:
            raise CheckpointError(f"{self.file}: the weights are quantised, which this version does not read.")
        for name in self.data:
            if name not in self.known:
                hint = nearest(name, self.known)
                raise CheckpointError(
                    f"{self.file}: unknown field {name!r}.{hint} If it does not change what the model computes, remove it."
                )


def lowest(fields: Fields, step: float, name: str = "time_step_limit") -> list[float]:
    """The limits of step sizes in the classes that take ``time_step_min`` for the lower one and have no upper one.

    Raises:
        CheckpointError: The file has limits of its own too, which these classes do not read.
    """
    limits = fields.floats(name, (0.0, math.inf))
    if limits != [0.0, math.inf]:
        raise CheckpointError(
            f"{fields.file}: {name} is {limits}, which transformers' class does not read: it limits step sizes by "
            f"time_step_min, {step}. Write the lower limit there, and remove {name}."
        )
    return [0.0 if step <= _NO_STEP else step, math.inf]


def written_lowest(limits: list[float]) -> dict[str, Any]:
    """The reverse of :func:`lowest`; what has an upper limit shows when the result is read back."""
    return {"time_step_min": limits[0] or _NO_STEP}


def written(options: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The reverse of :meth:`Fields.options`; nothing if there is no such mixer."""
    return {field[0]: options[option] for option, field in table.items()} if options else {}


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Family:
    """Base of the converters; stateless.

    Attributes:
        model_type: The field of this name in ``config.json``.
        architecture: transformers' class.
        ignored: A regular expression for stored tensors that are no weights.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    ignored: ClassVar[str] = r".*\.rotary_emb\.inv_freq"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config for theirs."""
        raise NotImplementedError

    def write(self, view: View) -> dict[str, Any]:
        """Their config for ours. May assume that ours has the family's form: whoever calls this reads the result back and compares."""
        raise NotImplementedError

    def keys(self, view: View) -> Iterator[Piece]:
        """Which tensor is which, under the names that are on disk."""
        raise NotImplementedError


_families: dict[str, Family] = {}


def register(cls: T) -> T:
    """Class decorator: the converter for ``cls.model_type``."""
    _families[cls.model_type] = cls()
    return cls


def families() -> dict[str, Family]:
    """All converters by ``model_type``, in the order in which an export tries them."""
    from . import families as _  # noqa: F401  (registers them)

    return _families
