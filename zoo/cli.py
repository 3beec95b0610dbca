"""The ``zoo`` command. Each command is a few lines around a function that anybody can call; heavy imports wait inside."""

import contextlib
import dataclasses
import enum
import json
import re
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

__all__ = ["app", "main"]

_EXTRAS = {
    "transformers": "train", "tokenizers": "train", "accelerate": "train", "tensorboard": "train", "lm_eval": "eval",
    "datasets": "eval", "matplotlib": "bench",
}  # fmt: skip


class _Commands(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit status."""

    def parse_args(self, ctx, args):
        if args[-1:] == ["--import"]:
            ctx.fail("Option '--import' requires an argument.")
        return super().parse_args(ctx, _imports_first(args))

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(130) from None
        except Exception as e:
            message = _message(e)
            if message is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            _say(f"error: {message}")
            raise typer.Exit(1) from e


def _message(error: Exception) -> str | None:
    # None for what is a defect of ours: that deserves its traceback
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").split(".")[0])):
        return f"this command needs {error.name}. Install it with: pip install 'hybridzoo[{extra}]'"
    if isinstance(error, ValueError | OSError | NotImplementedError | FloatingPointError) or type(error).__name__ in (
        "BackendError",
        "WorkerError",
    ):
        return str(error)
    return None


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

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the config: d_model=256 mixers.mamba.d_state=8", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU by default, if there is one.", show_default=False)]
Format = enum.StrEnum("Format", ["hf", "mamba_ssm", "hybridzoo"])
Dtype = enum.StrEnum("Dtype", ["float32", "bfloat16", "float16"])
Model = Annotated[str, typer.Argument(help="A saved folder, a hub id, or a name from `zoo list` (untrained).")]
# what terminals act on: C0 without tab and newline, DEL and C1
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"hybridzoo {__version__}")
        raise typer.Exit


@app.callback()
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


def _imports_first(args: list[str]) -> list[str]:
    # `zoo show my.yaml --import mine.py` is what one writes; the option is of the program and not of each command
    first: list[str] = []
    rest: list[str] = []
    i = 0
    while i < len(args) and args[i] != "--":
        if args[i] == "--import" and i + 1 < len(args):
            first += args[i : i + 2]
            i += 1
        else:
            (first if args[i].startswith("--import=") else rest).append(args[i])
        i += 1
    return first + rest + args[i:]


def _given_imports(ctx: typer.Context) -> list[str]:
    # what has to stand in a command that meets the same mixers
    return [word for source in ctx.find_root().params.get("imports") or [] for word in ("--import", source)]


@app.command("list", epilog="Example: [bold]zoo list jamba[/bold], or zoo list 'mamba2-*'")
def list_(
    pattern: Annotated[str, typer.Argument(help="A part of the name, or shell wildcards.")] = "*",
    as_json: Json = False,
    refresh: Annotated[bool, typer.Option("--refresh", hidden=True)] = False,
) -> None:
    """List the models that come with the zoo; the state is what a sequence of 1,024 tokens leaves behind."""
    from .config.shipped import NUMBERS, find_models, list_models

    if refresh:
        from .models.stats import numbers

        rows = (f"  {json.dumps(name)}: {json.dumps(numbers(name))}" for name in list_models())
        NUMBERS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    models = find_models(pattern)
    if as_json:
        return _print_json(models)
    from .tables import listed

    listed(models)


@app.command(epilog="Example: [bold]zoo show mamba-130m d_model=512[/bold]")
def show(
    model: Annotated[str, typer.Argument(help="A name from `zoo list`, a YAML file, or a saved folder.")],
    overrides: Overrides = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, for which FLOPs are stated.", min=1)] = 2048,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights.", show_default="a folder's own, else float32")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print every layer of a model with its parameters, FLOPs and state; nothing is allocated."""
    from .named import check_model

    check_model(model, hub=False)
    import torch

    from .models.build import build
    from .models.stats import config_of, stats, stored_dtype

    saved = Path(model).is_dir()
    kind = getattr(torch, dtype.value) if dtype else stored_dtype(model) if saved else None
    built = build(config_of(model) if saved else model, overrides or [], device="meta", dtype=kind)
    report = stats(built, seq_len)
    lengths = sorted({seq_len, 4096, 32_768, 262_144})
    state = {str(l): stats(built, l).state_bytes for l in lengths}
    if as_json:
        return _print_json({"name": model, **dataclasses.asdict(report), "state_bytes_by_length": state})
    from .tables import shown

    shown(model, report, state)


@app.command(epilog="Example: [bold]zoo train jamba-tiny d_model=64 --data texts/ --out runs/mine --steps 500[/bold]")
def train(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A name from `zoo list` or a YAML file, to train afresh; a saved folder or a hub id, to train its weights further."
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[Path, typer.Option(help="Text, .jsonl or .npy (token ids) file, or a folder of them.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/MODEL")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows per step and device.")] = 8,
    length: Annotated[int | None, typer.Option(help="Tokens per row.", show_default="max_length, at most 512")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Steps until the peak; below 1, their share.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    save_every: Annotated[int | None, typer.Option(help="Steps.", show_default="a tenth of all")] = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run, or start again.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model or another run that is in the run's folder.")
    ] = False,
    report_to: Annotated[str, typer.Option(help="tensorboard or none.")] = "tensorboard",
    device: Device = None,
) -> None:
    """Train a model on your text. Ctrl-C saves; the same command continues."""
    from .named import check_model
    from .train.options import TrainOptions, check_out, check_path, default_out

    # what can be wrong without a model is found before seconds of imports
    options = TrainOptions(
        steps=steps, batch_size=batch_size, length=length, lr=lr, warmup=warmup, weight_decay=weight_decay, seed=seed,
        save_every=save_every, resume=resume, overwrite=overwrite, report_to=report_to, device=device,
    )  # fmt: skip
    check_model(model)
    check_path(data)
    out = out or default_out(model)
    check_out(out)
    from .device import pick_device

    pick_device(device, numbered=False)  # torch alone is there in a third of the time that transformers takes
    from .train.run import Interrupted
    from .train.run import train as run

    try:
        result = run(model, data, out, overrides=overrides, **dataclasses.asdict(options))
    except Interrupted as e:
        again = shlex.join(["zoo", *(part for part in sys.argv[1:] if part != "--no-resume")])
        _say(f"step {e.step:,} of {e.steps:,} is saved in {e.folder}" if e.step else "no step is saved yet")
        _say(f"to go on: {again}")
        raise
    if result.resumed_from == steps:
        _say(f"{out} holds this run, finished; nothing to do (--no-resume trains again)")
    loss = result.history[-1]["loss"]
    _say(f"{steps} steps, {result.tokens:,} tokens at {result.tokens_per_second:,.0f} per second, last loss {loss:.3f}")
    again = shlex.join(["zoo", *_given_imports(ctx), "generate", str(out), "--prompt", "The "])
    _say(f"the model is in {out}; next: {again}")


@app.command(epilog="Example: [bold]zoo generate runs/demo/mamba-tiny --prompt 'The ' --temperature 0.8[/bold]")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that make up this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, what was said becomes less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    from .named import check_model

    check_model(model)
    import torch

    from .checkpoint import load
    from .device import pick_device
    from .models.build import build
    from .models.finite import check_finite
    from .tokenizer import encode_prompt, ends_of_text
    from .train.options import holds_weights

    at = pick_device(device)
    torch.manual_seed(seed)
    if Path(model).is_dir() or holds_weights(model):
        built = load(model, device=at)
        check_finite(built, model)
    else:
        built = build(model, device=at).eval()
        _say(f"{model} is a config: the model is untrained, and babbles")
    ids, ends = torch.tensor([encode_prompt(built, prompt)], device=at), ends_of_text(built)
    new = built.generate(
        ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
        eos_token_id=ends, generator=torch.Generator(at).manual_seed(seed),
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    text = built.tokenizer.decode(new[: -1 if new[-1:] and new[-1] in ends else None])
    if as_json:
        return _print_json({"model": model, "prompt": prompt, "text": text, "tokens": len(new)})
    text = f"{prompt}{text}"
    if _is_terminal():
        # what a model says, which may be somebody else's, is no command to the terminal
        text = _CONTROLS.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
    sys.stdout.write(f"{text}\n")


@app.command(epilog="Example: [bold]zoo convert state-spaces/mamba-130m out/ --to hf[/bold]")
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A folder of ours, transformers' or mamba-ssm's, or a hub id.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="A new folder; it appears when it is complete.")],
    to: Annotated[Format, typer.Option(help="The format to write.")] = Format.hf,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint in another format, bit for bit, and print what matched."""
    from .checkpoint import convert as run
    from .errors import printable

    # as a Text: in a plain string, brackets would be markup
    with Console(stderr=True).status(Text(printable(f"{source} -> {folder}"))):
        report = run(source, folder, to.value)
    if as_json:
        return _print_json(dataclasses.asdict(report))
    Console(soft_wrap=True, highlight=False, markup=False).print(printable(report, keep="\n"))


@app.command(
    "eval",
    epilog="Example: [bold]zoo eval runs/demo/mamba-tiny --tasks hybridzoo_bpb,hybridzoo_mqar --add-bos-token[/bold]",
)
def eval_(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks, with commas; wildcards for ours: 'hybridzoo_*'.")],
    limit: Annotated[float | None, typer.Option(help="Documents per task, or a share below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples before each question.", min=0)] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto.")] = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Window in tokens.", show_default="the config's", min=1)
    ] = None,
    add_bos_token: Annotated[
        bool, typer.Option("--add-bos-token", help="Start every prompt as a document of `zoo train` starts.")
    ] = False,
    metadata: Annotated[str | None, typer.Option(help='Sizes of tasks: \'{"hybridzoo_mqar": {"pairs": 4}}\'')] = None,
    out: Annotated[Path | None, typer.Option(help="Also write lm-eval's results to this JSON file.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score a model through lm-eval. `zoo lm-eval` takes every flag of lm-eval instead."""
    from ..eval.tasks import check_amounts, check_metadata, check_tasks
    from .named import check_model

    # what can be mistyped is looked at before seconds of imports
    check_model(model)
    asked, sizes = [task for task in tasks.split(",") if task], _read_json("--metadata", metadata)
    check_amounts(limit, batch_size, ("--limit", "--batch-size"))
    check_tasks(asked)
    if sizes is not None:
        check_metadata(asked, sizes)
    if out is not None and out.is_dir():
        raise ValueError(f"--out: {out} is a folder. Name a JSON file.")
    from ..eval.run import evaluate
    from ..eval.run import table as rows_of

    results = evaluate(
        model, asked, limit=int(limit) if limit and limit >= 1 else limit, num_fewshot=num_fewshot,
        batch_size=int(batch_size) if batch_size.isdigit() else batch_size, max_length=max_length,
        add_bos_token=add_bos_token or None, metadata=sizes, output=out, device=device,
    )  # fmt: skip
    if results is None:
        return None
    rows = rows_of(results)
    if as_json:
        return _print_json(rows)
    from .tables import columns, output

    table = columns("task", "metric", "value", "±", "chance", "n")
    for row in rows:
        numbers = ("" if row[k] is None else f"{row[k]:.4f}" for k in ("value", "stderr", "chance"))
        table.add_row(row["task"], row["metric"], *numbers, str(row["n"]))
    output().print(table)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: [bold]zoo lm-eval --model hybridzoo --model_args pretrained=runs/mine --tasks hybridzoo_mqar[/bold]",
)
def lm_eval(ctx: typer.Context) -> None:
    """The command line of lm-eval, all of it, with --model hybridzoo and our tasks known."""
    from ..eval.tasks import check_tasks
    from .named import check_model, option_pairs

    given = dict(option_pairs(ctx.args))
    if not {"--include_path", "-h", "--help"} & set(given):
        check_tasks([task for task in given.get("--tasks", given.get("-t", "")).split(",") if task])
    if given.get("--model") == "hybridzoo":
        arguments = dict(part.split("=", 1) for part in given.get("--model_args", "").split(",") if "=" in part)
        check_model(arguments.get("pretrained", "mamba-tiny"))
    from ..eval.run import lm_eval_main

    lm_eval_main(ctx.args)


@app.command(epilog="Example: [bold]zoo bench scan --vs transformers --vs mambapy[/bold]")
def bench(
    what: Annotated[
        str, typer.Argument(help="scan, ssd, train or parity; plot draws a result, readme writes the README.")
    ],
    file: Annotated[
        Path | None, typer.Argument(help="The JSON file to plot, or the README to write.", show_default=False)
    ] = None,
    vs: Annotated[list[str] | None, typer.Option(help="A peer to compare with; may be repeated.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure: table, paths, length, state, dtype, decode, conv or all of a scan on a GPU;"
            " a model, or model:variant, of train; fuzz of parity, which tries options drawn at random. May be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the result to this JSON file, beside what it holds of this commit.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Of train: print the kernels of a step.")] = False,
    as_json: Json = False,
) -> None:
    """Time an op, or a model's training step, against other implementations on the same device; or compare checkpoints with them."""
    if what == "plot":
        from ..eval.bench.show import plot

        if file is None:
            raise ValueError("bench plot: name the JSON file of results to draw.")
        results = _read_json(str(file), file.read_text(encoding="utf-8"))
        if not isinstance(results, dict) or "cases" not in results:
            raise ValueError(f"bench plot: {file} holds no result of zoo bench. Write one with --out.")
        drawn = plot(results, out or file.with_suffix(".svg"))
        return _say(f"wrote {drawn}")
    if what == "parity":
        from ..eval.parity.run import parity, table

        if part == ["fuzz"]:
            from ..eval.parity.fuzz import fuzz, summary

            tried = fuzz(out)
            return _print_json(tried) if as_json else Console(soft_wrap=True, markup=False).print(summary(tried))
        measured = parity(out)
        return _print_json(measured) if as_json else Console(soft_wrap=True, markup=False).print(table(measured))
    if what == "readme":
        from ..eval.bench.readme import refresh

        return _say("wrote " + ", ".join(str(p) for p in refresh(file or Path("README.md"))))
    from ..eval.bench.run import run_bench

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = run_bench(what, vs, out, part, profile)
    if as_json:
        _print_json(result)


@app.command(epilog="Example: [bold]zoo doctor[/bold]")
def doctor(device: Device = None, as_json: Json = False) -> None:
    """Say what is installed, and which backend every op takes here, and why."""
    from .device import pick_device
    from .doctor import examine

    report = examine(device)
    if as_json:
        _print_json(report)
    else:
        _print_doctor(report)
    pick_device(device)  # the report says what is wrong with a device, and the exit status that something is


def _print_doctor(report: dict[str, Any]) -> None:
    from .tables import output

    console = output()
    for title in (t for t in ("system", "gpu", "packages") if t in report):
        table = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold")
        for key, value in report[title].items():
            table.add_row(key, value)
        console.print(table)
    for op, backends in report["ops"].items():
        table = Table(box=None, show_header=False, title=op, title_justify="left", title_style="bold")
        for b in backends:
            table.add_row("→" if b["chosen"] else " ", b["backend"], b["reason"], style="" if b["chosen"] else "dim")
        console.print(table)


@app.command(epilog="Example: [bold]zoo demo[/bold]")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of continuing.")] = False,
) -> None:
    """Train three tiny models of one budget, evaluate them, and write a page that compares them."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file. Name a folder.")
    from ..eval.demo.run import run

    run(out, fresh=fresh)


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _print_json(content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write(_CONTROLS.sub(lambda c: f"\\u{ord(c[0]):04x}", text) + "\n")


def _read_json(option: str, text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{option}: is not JSON ({e}). Quote it: {option} '{{\"docs\": 100}}'.") from e


def _say(text: str) -> None:
    from .errors import printable

    # what a file says is no command to the terminal
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(printable(text, keep="\n"))


def main() -> None:
    """Entry point of the console script."""
    # a warning is for who typed the command, and not about the line of ours that gives it
    warnings.showwarning = lambda message, *rest, **more: _say(f"warning: {message}")
    app()
