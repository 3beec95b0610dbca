"""The commands that use an image model. Each is a few lines around a function that anybody can call; heavy imports wait inside."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import Device, Json, ModelName, print_json, say

__all__ = ["app"]

app = typer.Typer()


@app.command(epilog="Example: [bold]zoo predict runs/digits photo.png more/ --top 3[/bold]")
def predict(
    model: ModelName,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, and folders of some.")],
    top: Annotated[int, typer.Option(help="How many classes of each image.", min=1)] = 5,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say what an image model takes images for. Files that are no whole images are named, and the exit status is 1 then."""
    from .named import check_model

    check_model(model)
    from .images.damaged import DamagedImage
    from .images.opened import image_model
    from .images.predict import files_of, predictions
    from .tables import columns, output
    from .terminal import counting

    files = files_of(images)
    built = image_model(model, device, "zoo generate continues a text.")
    damaged: list[DamagedImage] = []
    found: list[dict[str, Any]] = []
    with counting("images", len(files)) as done:
        for one in predictions(built, files, top, damaged):
            found.append(one)
            done(1)
    for error in damaged:
        say(f"error: {error}")
    if as_json:
        print_json(found)
    elif found:
        table = columns("image", "class", "probability")
        for one in found:
            for i, guess in enumerate(one["classes"]):
                table.add_row("" if i else one["image"], guess["name"], f"{guess['probability']:.2%}")
        output().print(table)
    if damaged:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo explain runs/digits --out explain.html[/bold]")
def explain(
    model: ModelName,
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGE...]", help="Images to look at, and folders of some; noise by default.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page, or its picture alone: .html, .svg, .png; or .json.")] = Path(
        "explain.html"
    ),
    size: Annotated[
        int | None, typer.Option(help="Height and width to look at.", show_default="the config's image_size", min=1)
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw what an image model sees: its effective receptive field, as a whole and through each walk of its scans."""
    from .named import check_model

    check_model(model)
    from .images.explain import FORMATS, write_explained
    from .images.explain import explain as run

    if out.suffix not in FORMATS or out.is_dir():
        raise ValueError(f"--out: {out} is no file that ends in {', '.join(FORMATS)}. Name one.")
    from .report.explained import walk_name
    from .tables import columns, output

    result = run(model, images or None, size=size, device=device)
    write_explained(result, out)
    if as_json:
        return print_json(result)
    table = columns("", "walk", "middle quarter", "middle half")
    for state in result["states"]:
        for i, field in enumerate(state["fields"]):
            shares = (f"{share:.1%}" for share in field["middle"].values())
            table.add_row("" if i else state["name"], walk_name(field["walk"]), *shares)
    output().print(table)
    say(f"wrote {out}")
