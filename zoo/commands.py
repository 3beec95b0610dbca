"""The zoo's commands. Each is a few lines around a function that anybody can call; heavy imports wait inside."""

import dataclasses
import enum
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import printable
from .terminal import Device, Dtype, Json, counted, print_json, print_report, say, torch_dtype, with_options
from .train.options import TrainOptions

__all__ = ["app"]

app = typer.Typer()

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the config: d_model=256 mixers.mamba.d_state=8", show_default=False),
]
Format = enum.StrEnum("Format", ["hf", "mamba_ssm", "hybridzoo", "vmamba", "vim"])


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
        return print_json(models)
    from .tables import listed

    listed(models)


@app.command(epilog="Example: [bold]zoo show mamba-130m d_model=512[/bold]")
def show(
    model: Annotated[str, typer.Argument(help="A name from `zoo list`, a YAML file, or a saved folder.")],
    overrides: Overrides = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len",
            "--image-size",
            min=1,
            show_default="2048, or the config's image_size",
            help="Tokens per sequence, or pixels in each direction of an image, for which FLOPs are stated.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights.", show_default="a folder's own, else float32")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print every layer of a model with its parameters, FLOPs and state; nothing is allocated."""
    from .named import check_model

    check_model(model, hub=False)
    from .checkpoint import load
    from .checkpoint.inspect import config_of, stored_dtype
    from .checkpoint.single import file_in
    from .models.build import build
    from .models.stats import stats

    saved, file = Path(model).is_dir(), file_in(Path(model))
    kind = torch_dtype(dtype) or (stored_dtype(model) if saved else None)
    if file is not None and overrides:
        raise ValueError(
            f"{overrides[0]}: cannot be changed in a file of weights, {file}. Leave it out, or name a config."
        )
    if file is not None:
        built = load(file, device="meta", dtype=kind)
    else:
        built = build(config_of(model) if saved else model, overrides or [], device="meta", dtype=kind)
    report, counted = stats(built, seq_len), None
    state = {}
    if report.unit == "image":
        from .models.macs import macs

        counted = macs(built, seq_len)
    else:
        lengths = sorted({report.seq_len, 4096, 32_768, 262_144})
        state = {str(l): stats(built, l).state_bytes for l in lengths}
    if as_json:
        more = {"macs": counted._asdict()} if counted else {"state_bytes_by_length": state}
        return print_json({"name": model, **dataclasses.asdict(report), **more})
    from .tables import shown

    shown(model, report, state, counted)


@app.command(epilog="Example: [bold]zoo train jamba-tiny d_model=64 --data texts/ --out runs/mine --steps 500[/bold]")
@with_options(TrainOptions)
def train(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A name from `zoo list` or a YAML file, to train afresh; a saved folder or a hub id, to train its weights further."
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        Path,
        typer.Option(
            help="Text, .jsonl, .parquet or .npy (token ids) file, a folder of them or of a dataset, or - for standard input; of images a "
            "folder of class folders or of a dataset, digits or mnist-5k.",
            rich_help_panel="Data",
        ),
    ] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path | None, typer.Option(help="The run's folder.", show_default="runs/MODEL", rich_help_panel="Run")
    ] = None,
    **given: Any,
) -> None:
    """Train a model on your text or images. Ctrl-C saves; the same command continues."""
    from .images.builtin import check_data
    from .named import check_model
    from .train.options import check_out, default_out

    # what can be wrong without a model is found before seconds of imports
    options = TrainOptions(**given)
    check_model(model)
    check_data(data)
    out = out or default_out(model)
    check_out(out)
    from .device import pick_device

    pick_device(options.device, numbered=False)  # torch alone is there in a third of the time that transformers takes
    from .train.run import Interrupted
    from .train.run import train as run

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, which would all say the same
    try:
        result = run(model, data, out, overrides=overrides, **given)
    except Interrupted as e:
        if not first:
            raise
        again = shlex.join(["zoo", *(part for part in sys.argv[1:] if part != "--no-resume")])
        say(f"step {e.step:,} of {e.steps:,} is saved in {e.folder}" if e.step else "no step is saved yet")
        say(f"to go on: {again}")
        raise
    if first:
        imports = [word for source in ctx.find_root().params["imports"] or [] for word in ("--import", source)]
        _say_how_it_went(result, options, out, imports)


def _say_how_it_went(result: Any, options: TrainOptions, out: Path, imports: list[str]) -> None:
    if result.resumed_from == options.steps:
        say(f"{out} holds this run, finished; nothing to do (--no-resume trains again)")
    loss, steps = result.history[-1]["loss"], int(result.history[-1]["step"])
    if steps < options.steps and (result.best or {}).get("eval_accuracy", 0) >= (options.until or 2):
        say(f"stopped early, after step {steps}: {result.best['eval_accuracy']:.2%} of the answers are right")
    elif steps < options.steps:
        say(
            f"stopped early, after step {steps}: {counted(options.patience or 0, 'evaluation')} "
            f"{'was' if options.patience == 1 else 'were'} not better than the best"
        )
    say(
        f"{counted(steps, 'step')}, {result.tokens:,} {result.unit} at {result.tokens_per_second:,.0f} per second, last loss {loss:.3f}"
    )
    next_ = ["predict", str(out), "IMAGE"] if result.unit == "images" else ["generate", str(out), "--prompt", "The "]
    again, of = shlex.join(["zoo", *imports, *next_]), ""
    if result.best:
        right = f", {result.best['eval_accuracy']:.2%} right" if "eval_accuracy" in result.best else ""
        of = f", as of step {result.best['step']}, the best on val (loss {result.best['eval_loss']:.3f}{right})"
    say(f"the model is in {out}{of}; next: {again}")


@app.command(epilog="Example: [bold]zoo report runs/mine[/bold]")
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run, finished or not.")],
    as_json: Json = False,
) -> None:
    """Write the page of a training again, OUT/report.html: its curves, speed and facts."""
    from .train.report import write_report

    page = write_report(out)
    print_json({"report": str(page)}) if as_json else say(f"wrote {page}")


@app.command(epilog="Example: [bold]zoo convert state-spaces/mamba-130m out/ --to hf[/bold]")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A folder of ours, transformers' or mamba-ssm's, a hub id, or a .pth file of VMamba or Vim.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="A new folder; it appears when it is complete.")],
    to: Annotated[
        Format | None, typer.Option(help="The format to write.", show_default="hf for texts, hybridzoo for others")
    ] = None,
    config: Annotated[str | None, typer.Option(help="The config of a file without any; found in its tensors.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of a training's file: model, or model_ema.")] = None,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint in another format, bit for bit, and print what matched."""
    from .checkpoint import convert as run

    # as a Text: in a plain string, brackets would be markup
    with Console(stderr=True).status(Text(printable(f"{source} -> {folder}"))):
        report = run(source, folder, to and to.value, config=config, weights=weights)
    if as_json:
        return print_json(dataclasses.asdict(report))
    print_report(report)


@app.command(epilog="Example: [bold]zoo doctor[/bold]")
def doctor(device: Device = None, as_json: Json = False) -> None:
    """Say what is installed, and which backend every op takes here, and why."""
    from .device import pick_device
    from .doctor import examine

    report = examine(device)
    if as_json:
        print_json(report)
    else:
        _print_doctor(report)
    pick_device(device)  # the report says what is wrong with a device, and the exit status that something is


def _print_doctor(report: dict[str, Any]) -> None:
    from .tables import output

    console = output()
    facts = {title: report[title].items() for title in ("system", "gpu", "packages") if title in report}
    for title, rows in (facts | report["ops"]).items():
        table = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold")
        for row in rows:
            cells = row if title in facts else ("→" if row["chosen"] else " ", row["backend"], row["reason"])
            table.add_row(*cells, style="dim" if cells[0] == " " else "")
        console.print(table)
