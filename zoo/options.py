"""Options, each spelled once as a field of a dataclass: signatures, their documentation, checks and command lines are made of it.

Needs the standard library alone, so that a command line finds what is mistyped before anything heavy is imported.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack, get_args

__all__ = ["About", "at_least", "called_with", "check_options", "option", "parameters_of", "within"]

P = ParamSpec("P")
O = TypeVar("O")
R = TypeVar("R")
Bound = tuple[str, Callable[[Any], bool]]


class About(TypedDict, total=False):
    """More of a field than its name and its type say.

    Attributes:
        unset: Words for what is done where it is ``None``.
        bound: Words for the numbers that are allowed, and a test of one.
        choices: All values that there are.
        several: Whether more than one of them may be named, with commas.
        setting: Whether a run that is continued must have the value that it began with; others are of one call.
        trainer: The argument of transformers' ``TrainingArguments`` that it is.
        of: The kind of data that it is about, where there are others: ``text`` or ``images``.
        panel: The group of a command line's help that it stands in.
        typed: The type of what a command line says, where Python may say more.
    """

    unset: str
    bound: Bound | None
    choices: tuple[str, ...]
    several: bool
    setting: bool
    trainer: str
    of: str
    panel: str
    typed: Any


_UNSAID: About = {
    "unset": "", "bound": None, "choices": (), "several": False, "setting": True, "trainer": "", "of": "", "panel": "", "typed": None,
}  # fmt: skip


def option(default: Any, help: str, *, kw_only: bool = True, **about: Unpack[About]) -> Any:
    """Return a field of a dataclass with a default, a sentence of help, and more :class:`About` it, all in its ``metadata``."""
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"help": help, **_UNSAID, **about})


def at_least(least: int) -> Bound:
    """Return the bound of numbers from ``least`` on."""
    return f"at least {least}", lambda value: value >= least


def within(least: float, below: float, closed: bool = False) -> Bound:
    """Return the bound of numbers from ``least`` up to ``below``, which is among them where ``closed``."""
    words = f"from {least:g} to {below:g}" if closed else f"at least {least:g}, and below {below:g}"
    return words, lambda value: least <= value < below or (closed and value == below)


def parameters_of(options: Any) -> list[tuple[inspect.Parameter, Mapping[str, Any]]]:
    """Return the fields of a dataclass as parameters, each with its metadata."""
    about = {field.name: field.metadata for field in dataclasses.fields(options)}
    return [(p, about[p.name]) for p in inspect.signature(options).parameters.values()]


def check_options(options: Any, where: str) -> None:
    """Raise a ``ValueError`` for a field of a frozen dataclass that is none of its values; make numbers of NumPy plain, as JSON wants."""
    for parameter, about in parameters_of(type(options)):
        name, value = parameter.name, getattr(options, parameter.name)
        kinds = get_args(parameter.annotation) or (parameter.annotation,)
        choices, (words, allowed) = about.get("choices") or (), about.get("bound") or ("", lambda value: True)
        several = about.get("several") and isinstance(value, str)
        named = [part.strip() for part in value.split(",")] if several else [value]
        for unknown in (part for part in named if choices and part not in choices):
            close = difflib.get_close_matches(str(unknown), choices, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name}={value!r}: is not known.{hint} Known: {', '.join(choices)}.")
        if value is None or not {int, float} & set(kinds):
            continue
        wrong = None
        if int in kinds and not isinstance(value, numbers.Integral):
            wrong = "an integer."
        elif int in kinds and not allowed(value):
            wrong = f"{words}." + (" Leave it out for the default." if type(None) in kinds else "")
        elif float in kinds and not (isinstance(value, numbers.Real) and math.isfinite(value) and allowed(value)):
            wrong = f"a number {words}, and finite." if words else "a finite number."
        if wrong:
            raise ValueError(f"{where}({name}={value!r}): must be {wrong}")
        object.__setattr__(options, name, int(value) if int in kinds else float(value))


def called_with(options: Callable[P, O]) -> Callable[[Callable[[O], R]], Callable[P, R]]:
    """Return a decorator by which a function of a dataclass is called with the fields instead, which are its signature and its ``Args``."""

    def decorate(function: Callable[[O], R]) -> Callable[P, R]:
        parameters = parameters_of(options)
        signature = inspect.signature(function).replace(parameters=[p for p, _ in parameters])

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as e:
                raise TypeError(f"{function.__name__}() {e}") from None
            return function(options(*args, **kwargs))

        summary, raises, errors = inspect.cleandoc(function.__doc__ or "").partition("Raises:\n")
        fields = (_documented(p.name, about) for p, about in parameters)
        call.__doc__ = "\n".join([summary.rstrip(), "", "Args:", *fields, "", raises + errors])
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _documented(name: str, about: Mapping[str, Any]) -> str:
    text = f"{name}: {about['help']}" + (f" By default {about['unset']}." if about.get("unset") else "")
    return textwrap.fill(text, 110, initial_indent=" " * 4, subsequent_indent=" " * 8)
