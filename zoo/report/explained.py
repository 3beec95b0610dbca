"""A page and pictures of what a model sees, from what :func:`hybridzoo.zoo.images.explain.explain` returns."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..lazily import needed
from .blocks import page, table
from .cells import SHADES, Field, heat_maps, shade
from .charts import picture

__all__ = ["explained_page", "explained_picture", "explained_png", "walk_name"]

Result = dict[str, Any]
_COLUMNS = 5
_WHERE = "Share of it in the middle, of a quarter and of half the height and width"
_ABOUT = (
    "How much the middle of the last map depends on every pixel: the effective receptive field (arXiv:1701.04128), the mean over images of "
    "the gradient's absolute value, 1 where it is largest; a shade is the square root of it. Below each map is how much of it lies inside "
    "the middle half of height and width."
)
_WALKS = (
    "Of a walk, it is the part that passes through the states of scans in its order and no other; an arrow says which way the scan goes, "
    "so that it has seen what lies behind it. What passes through residuals and skips alone is left out there."
)


def explained_page(result: Result) -> str:
    """Return a page with a map of every walk, before and after training, and the numbers."""
    parts = [
        f'<p class="kicker">{escape(result["model"])}</p>',
        f"<h1>{escape(_title(result))}</h1>",
        f'<p class="lead">{escape(_ABOUT)}</p>',
    ]
    if len(result["states"][0]["fields"]) > 1:
        parts.append(f'<p class="note">{escape(_WALKS)}</p>')
    for state in result["states"]:
        chart = heat_maps(_label(result, state), _fields(state), 150, _columns(state))
        parts += [f"<h2>{state['name'].capitalize()}</h2>", f"<figure>{chart.html()}</figure>"]
    parts += ["<h2>In numbers</h2>", f'<p class="note">{_WHERE}, over {escape(_over(result))}.</p>']
    heads = [f"{state['name']}, {side}" for state in result["states"] for side in ("a quarter", "half")]
    rows = [
        [walk_name(fields[0]["walk"]), *(f"{share:.1%}" for f in fields for share in f["middle"].values())]
        for fields in zip(*(state["fields"] for state in result["states"]), strict=True)
    ]
    parts.append(table(["", *heads], rows))
    return page(f"hybridzoo: what {result['model']} sees", "\n".join(parts))


def explained_picture(result: Result) -> str:
    """Return the maps as an SVG file; below each, how much of it lies in the middle half of height and width."""
    states = result["states"]
    panels = [
        (state["name"], heat_maps(_label(result, state), _fields(state), 78, _columns(state))) for state in states
    ]
    return picture(_title(result), panels)


def explained_png(result: Result) -> bytes:
    """Return the maps as a PNG file.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
    """
    library, draws = (needed(f"PIL.{name}", "draws pictures", "'hybridzoo[vision]'") for name in ("Image", "ImageDraw"))
    font = needed("PIL.ImageFont", "draws pictures", "'hybridzoo[vision]'").load_default(17)
    side, gap, top = 200, 16, 44
    lines = [
        state["fields"][i : i + _COLUMNS]
        for state in result["states"]
        for i in range(0, len(state["fields"]), _COLUMNS)
    ]
    names = [state["name"] for state in result["states"] for _ in range(0, len(state["fields"]), _COLUMNS)]
    wide, line = max(map(len, lines)), side + 2 * 30 + gap
    made = library.new("RGB", (gap + wide * (side + gap), top + len(lines) * line), "white")
    draw = draws.Draw(made)
    draw.text((gap, 14), _title(result), "black", font)
    for i, (name, fields) in enumerate(zip(names, lines, strict=True)):
        for j, field in enumerate(fields):
            x, y = gap + j * (side + gap), top + i * line
            # Pillow's font has no arrows
            draw.text((x, y + 4), f"{name}: {field['walk'] or 'all'}" if not j else field["walk"], "black", font)
            image = library.fromarray(_coloured(field["field"]))
            by = min(side / image.width, side / image.height)
            size = max(1, round(image.width * by)), max(1, round(image.height * by))
            made.paste(image.resize(size, library.Resampling.NEAREST), (x, y + 30))
            draw.text((x, y + 34 + side), _note(field), "#66625d", font)
    content = io.BytesIO()
    made.save(content, "PNG")
    return content.getvalue()


def walk_name(walk: str | None) -> str:
    """Return a walk's name with an arrow: ``rows-back`` is ``rows ←``."""
    if walk is None:
        return "all"
    *window, way = walk.removesuffix("-back").split("-")
    arrow = {"rows": "→←", "columns": "↓↑"}[way][walk.endswith("-back")]
    size = window[0].removeprefix("window") if window else ""
    return f"{size}×{size} {arrow}" if size else f"{way} {arrow}"


def _fields(state: Result) -> list[Field]:
    return [(walk_name(field["walk"]), _note(field), field["field"]) for field in state["fields"]]


def _note(field: Result) -> str:
    return f"{field['middle']['0.5']:.0%} inside"


def _columns(state: Result) -> int:
    return min(_COLUMNS, len(state["fields"]))


def _title(result: Result) -> str:
    return f"What the middle of {Path(result['model']).name or result['model']} sees of {_over(result)}"


def _over(result: Result) -> str:
    h, w = result["size"]
    images = "images of noise" if result["noise"] else "image" if result["images"] == 1 else "images"
    return f"{result['images']} {images}, {h} x {w}"


def _label(result: Result, state: Result) -> str:
    shares = "; ".join(f"{field['walk'] or 'all'}: {_note(field)}" for field in state["fields"])
    return f"Receptive fields of {result['model']}, {state['name']}; in the middle half of height and width, {shares}"


def _coloured(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Shades on white, as the charts of a light page have them."""
    shares = np.array([[shade(v) / SHADES for v in row] for row in rows])[:, :, None]
    ground, colour = np.array([243, 241, 237]), np.array([0, 0x72, 0xB2])
    return np.round(ground + shares * (colour - ground)).astype(np.uint8)
