"""The commands of studies, ``zoo ablate``. Each is a few lines around a function that anybody can call; heavy imports wait inside."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...zoo.terminal import Device, Json, counted, counting, print_json, print_report, say

if TYPE_CHECKING:
    from .cells import Point

__all__ = ["app"]

app = typer.Typer(name="ablate", no_args_is_help=True, help="Compare models of equal cost: a study is one YAML file.")

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A name from `zoo ablate list`, or a YAML file.")]
Scale = Annotated[
    str, typer.Option(help="Of the study's: smoke (minutes on a CPU), short (one GPU, under an hour) or paper (hours).")
]
Folder = Annotated[
    Path | None, typer.Option(help="Where results are kept.", show_default="runs/ablate/STUDY-SCALE"),
]  # fmt: skip
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="A database as the queue of many hosts: postgresql://...", show_default="a file in the folder"
    ),
]  # fmt: skip


@app.command("list", epilog="Example: [bold]zoo ablate list[/bold]")
def list_(as_json: Json = False) -> None:
    """List the studies that come with the zoo, and what each answers."""
    from ...zoo.tables import columns, output
    from .schema import described

    studies = described()
    if as_json:
        return print_json(studies)
    table = columns("study", "what it answers", "scales", left=3)
    table.columns[0].no_wrap = True
    for study in studies:
        table.add_row(study["name"], study["question"], " ".join(study["scales"]))
    output().print(table)


@app.command(epilog="Example: [bold]zoo ablate show recall-ratio > my_study.yaml[/bold]")
def show(study: StudyName, scale: Scale = "short", as_json: Json = False) -> None:
    """Print a study as the YAML file that it is at a scale, to begin one's own with."""
    from .schema import load_study, written

    spec = load_study(study, scale)
    if as_json:
        return print_json(spec.data)
    print_report(written(spec).rstrip())


@app.command(epilog="Example: [bold]zoo ablate plan recall-ratio --scale smoke[/bold]")
def plan(study: StudyName, scale: Scale = "short", folder: Folder = None, as_json: Json = False) -> None:
    """Build every model of a study without allocating it, and print what each costs and how long all take; nothing is trained."""
    from ...zoo.tables import output
    from .plan import spent
    from .points import places_of, points_of
    from .study import Study

    opened = Study(study, scale, folder=folder)
    with counting("points", len(places_of(opened.spec))) as done:
        opened.points = points_of(opened.spec, done)
    planned = opened.plan()
    if as_json:
        print_json(planned.plain())
    elif planned.cells:
        print_report(opened.spec.question)
        output().print(planned.table())
        cells = f"{counted(planned.cells, 'training')} of {counted(len(planned.points), 'point')}"
        print_report(f"{cells}, {planned.flops:.2g} FLOPs, {spent(planned.seconds)} one after another ({planned.how})")
    _say_problems(opened.points)
    if not planned.cells:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo ablate run recall-ratio --scale smoke --workers 2[/bold]")
def run(
    study: StudyName,
    scale: Scale = "short",
    workers: Annotated[int, typer.Option(min=1, help="Trainings at once on this host.")] = 1,
    only: Annotated[str | None, typer.Option(help="Points whose names match: 'attention=0.25*'.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, with checkpoints kept; the same command goes on.")
    ] = None,
    device: Device = None,
    folder: Folder = None,
    storage: Storage = None,
    again: Annotated[bool, typer.Option("--again", help="Try cells again that were given up.")] = False,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Start the workers as jobs of SLURM: partition=gpu. May be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train what a study has left to train. It may be run again, and by several processes or hosts at once; results are shared."""
    settings = _pairs("--slurm", slurm or [])
    from .study import Study

    opened = Study(study, scale, folder=folder, storage=storage)
    _say_problems(opened.points)
    if slurm:
        jobs = opened.submit(workers, only=only, minutes=minutes, device=device, settings=settings)
        say(f"submitted {', '.join(str(job.job_id) for job in jobs)}; what they say is in {opened.folder / 'slurm'}")
        return
    summary = opened.run(workers, only=only, minutes=minutes, device=device, again=again)
    print_json(summary.plain()) if as_json else print_report(str(summary))
    raise typer.Exit(summary.status)


@app.command(epilog="Example: [bold]zoo ablate report recall-ratio --scale smoke[/bold]")
def report(
    study: StudyName,
    scale: Scale = "short",
    folder: Folder = None,
    storage: Storage = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and what is beside it.", show_default="the study's")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write report.html of what has been trained, with pictures, CSV and JSON beside it."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file. Name a folder.")
    from .study import Study

    opened = Study(study, scale, folder=folder, storage=storage)
    if not opened.results() and not opened.failures():
        raise ValueError(
            f"{opened.folder}: nothing of {opened.spec.name}, {opened.spec.scale}, is trained yet. Run zoo ablate run first."
        )
    page = opened.report(out)
    if as_json:
        return print_json({"report": str(page)})
    say(f"wrote {page}, of {counted(len(opened.results()), 'result')}")
    if stale := opened.stale():
        say(f"left out: {counted(stale, 'result')} of other code or of an earlier version of the study")


def _say_problems(points: "Sequence[Point]") -> None:
    """Name the points that cannot be built or matched, once for every reason."""
    from .words import listed

    reasons: dict[str, list[str]] = {}
    for point in points:
        if point.problem:
            reasons.setdefault(point.problem, []).append(point.name)
    for reason, names in reasons.items():
        say(f"left out: {f'all {len(names)} points' if len(names) == len(points) > 1 else listed(names)}: {reason}")


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (key, equals, value) in zip(texts, pairs, strict=True):
        if not (key and equals and value):
            raise ValueError(f"{option}: found {text!r}, expected KEY=VALUE, such as partition=gpu.")
    return {key: value for key, _, value in pairs}
