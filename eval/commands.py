"""The commands of evaluation. Each is a few lines around a function that anybody can call; heavy imports wait inside."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..zoo.terminal import Device, Json, ModelName, print_json, print_report, say
from .ablate.commands import app as ablate

__all__ = ["app"]

app = typer.Typer()
app.add_typer(ablate)


@app.command(
    "eval",
    epilog="Example: [bold]zoo eval runs/demo/mamba-tiny --tasks hybridzoo_bpb[/bold], or zoo eval runs/digits --data digits",
)
def eval_(
    model: ModelName,
    tasks: Annotated[
        str | None,
        typer.Option(help="Of a text model: names of lm-eval tasks, with commas; wildcards for ours: 'hybridzoo_*'."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Of an image model: a folder of class folders, a table, or digits or mnist-5k; its test part, if it has parts."
        ),
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Documents per task, or images, or a share below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples before each question.", min=0)] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto.")] = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Window in tokens.", show_default="the config's", min=1)
    ] = None,
    add_bos_token: Annotated[
        bool, typer.Option("--add-bos-token", help="Start every prompt as a document of `zoo train` starts.")
    ] = False,
    metadata: Annotated[str | None, typer.Option(help='Sizes of tasks: \'{"hybridzoo_mqar": {"pairs": 4}}\'')] = None,
    damaged: Annotated[
        str, typer.Option(help="stop or skip: what is done about files that are no whole images.")
    ] = "stop",
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the results to this JSON file, and of images the confusion matrix beside it."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score a text model through lm-eval (`zoo lm-eval` takes every flag of it), or an image model on images."""
    from ..zoo.named import check_model
    from .tasks import check_amounts, check_metadata, check_tasks

    # what can be mistyped is looked at before seconds of imports
    check_model(model)
    asked = None if tasks is None else [task for task in tasks.split(",") if task]
    sizes = _read_json("--metadata", metadata)
    check_amounts(limit, batch_size, ("--limit", "--batch-size"))
    if data is None:
        check_tasks(asked or [])
        if sizes is not None:
            check_metadata(asked or [], sizes)
    if out is not None and out.is_dir():
        raise ValueError(f"--out: {out} is a folder. Name a JSON file.")
    from .evaluate import evaluate

    results = evaluate(
        model, asked, data=data, limit=int(limit) if limit and limit >= 1 else limit, num_fewshot=num_fewshot, metadata=sizes,
        batch_size=int(batch_size) if batch_size.isdigit() else batch_size, max_length=max_length, output=out, device=device,
        add_bos_token=add_bos_token or None, damaged=damaged,
    )  # fmt: skip
    if results is not None:
        _print_tasks(results, as_json) if data is None else _print_images(results, as_json)


def _print_tasks(results: dict[str, Any], as_json: bool) -> None:
    from ..zoo.tables import columns, output
    from .run import table as rows_of

    rows = rows_of(results)
    if as_json:
        return print_json(rows)
    table = columns("task", "metric", "value", "±", "chance", "n")
    for row in rows:
        numbers = ("" if row[k] is None else f"{row[k]:.4f}" for k in ("value", "stderr", "chance"))
        table.add_row(row["task"], row["metric"], *numbers, str(row["n"]))
    output().print(table)


def _print_images(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(results)
    from ..zoo.tables import columns, output
    from .images import worst

    table = columns("", "value", "±", "n", left=1)
    for name in ("top1", "top5", "loss"):
        if (value := results[name]) is not None:
            stderr = results[f"{name}_stderr"]
            table.add_row(name, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}", f"{results['n']:,}")
    output().print(table)
    classes = columns("class", "right", "n", left=1)
    shown = worst(results["confusion"])
    for i in shown:
        one = results["classes"][i]
        classes.add_row(one["name"], "" if one["top1"] is None else f"{one['top1']:.4f}", f"{one['n']:,}")
    output().print(classes)
    if more := len(results["classes"]) - len(shown):
        say(f"{more:,} other classes, with less mistaken: --json or --out")


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: [bold]zoo lm-eval --model hybridzoo --model_args pretrained=runs/mine --tasks hybridzoo_mqar[/bold]",
)
def lm_eval(ctx: typer.Context) -> None:
    """The command line of lm-eval, all of it, with --model hybridzoo and our tasks known."""
    from ..zoo.named import check_model, option_pairs
    from .tasks import check_tasks

    given = dict(option_pairs(ctx.args))
    if not {"--include_path", "-h", "--help"} & set(given):
        check_tasks([task for task in given.get("--tasks", given.get("-t", "")).split(",") if task])
    if given.get("--model") == "hybridzoo":
        arguments = dict(part.split("=", 1) for part in given.get("--model_args", "").split(",") if "=" in part)
        check_model(arguments.get("pretrained", "mamba-tiny"))
    from .run import lm_eval_main

    lm_eval_main(ctx.args)


_MEASURED = (
    "scan, ssd, attention, train, trainer (zoo train itself), vision (image models), generate (models at growing contexts), "
    "step (launches of decoding), tutorial (the run of docs/train.md), fields (the picture of docs/vision.md), data or parity; plot"
    " draws a result, readme writes the figures of our pages."
)
_PARTS = (
    "What to measure: table, paths, length, state, dtype, decode, conv or all of a scan on a GPU; table, packed, window or all"
    " of attention; a model, or model:variant, of train, trainer and vision; walks or bytes of vision; linear, choose, attention,"
    " update or model of step; tiny, 130m or 2.8b, or one of :batch, :half, :long or :repeats behind it, of generate; gigabytes, or"
    " bpe:gigabytes, of data; fuzz of parity, which tries options drawn at random. May be repeated."
)


@app.command(epilog="Example: [bold]zoo bench scan --vs transformers --vs mambapy[/bold]")
def bench(
    what: Annotated[
        str,
        typer.Argument(help=_MEASURED),
    ],
    file: Annotated[
        Path | None, typer.Argument(help="The JSON file to plot, or the README to write.", show_default=False)
    ] = None,
    vs: Annotated[list[str] | None, typer.Option(help="A peer to compare with; may be repeated.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help=_PARTS),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the result to this JSON file, beside what it holds of these versions."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Of train and vision: print the kernels of a step.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time an op, or a model's training step, against other implementations on the same device; or compare checkpoints with them."""
    if what == "plot":
        return _plot(file, out)
    if what == "parity":
        from .parity import fuzz, run

        measure, report = (fuzz.fuzz, fuzz.summary) if part == ["fuzz"] else (run.parity, run.table)
        result = measure(out)
        return print_json(result) if as_json else print_report(report(result))
    if what in ("tutorial", "fields"):
        from .bench import fields, tutorial

        make, place = (tutorial.tutorial, tutorial.PLACE) if what == "tutorial" else (fields.fields, fields.PLACE)
        result = make(out or place)
        return print_json(result) if as_json else say(f"wrote {out or place}; zoo bench readme draws it")
    if what == "data":
        from ..zoo.tables import output
        from .bench.data import bench_data, table

        measured = bench_data(part, out, lambda size: say(f"{size} GB"))
        return print_json(measured) if as_json else output().print(table(measured))
    if what == "readme":
        from .bench.readme import refresh

        return say("wrote " + ", ".join(str(p) for p in refresh(file or Path("README.md"))))
    from .bench.run import run_bench

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = run_bench(what, vs, out, part, profile)
    if as_json:
        print_json(result)


@app.command(epilog="Example: [bold]zoo demo[/bold]")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of continuing.")] = False,
) -> None:
    """Train three tiny models of one budget, evaluate them, and write a page that compares them."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file. Name a folder.")
    from .demo.run import run

    run(out, fresh=fresh)


def _plot(file: Path | None, out: Path | None) -> None:
    from .bench.show import plot

    if file is None:
        raise ValueError("bench plot: name the JSON file of results to draw.")
    results = _read_json(str(file), file.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or "cases" not in results:
        raise ValueError(f"bench plot: {file} holds no result of zoo bench. Write one with --out.")
    say(f"wrote {plot(results, out or file.with_suffix('.svg'))}")


def _read_json(option: str, text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{option}: is not JSON ({e}). Quote it: {option} '{{\"docs\": 100}}'.") from e
