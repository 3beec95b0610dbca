"""The demo in one picture for the README: the layers of every model, and its training loss beside the others'."""

from html import escape
from typing import Any

from ...zoo.layout import expand
from ...zoo.report.charts import Chart, colour, picture
from .page import headline, losses, title

__all__ = ["overview"]


def overview(results: dict[str, Any]) -> str:
    """Return an SVG file of what :func:`.run.run` collects."""
    panels = [("layers, from input to output", _layers(results["models"])), ("training loss", losses(results))]
    return picture(headline(results), panels)


def _layers(models: list[dict[str, Any]]) -> Chart:
    patterns = [expand(model["pattern"]) for model in models]
    width, parts = 100 / max(map(len, patterns)), []
    for i, (model, pattern) in enumerate(zip(models, patterns, strict=True)):
        y = 32 * i
        place = f'y="{y + 18}" dx="-10" text-anchor="end"'
        parts.append(f'<text {place} class="strong" style="fill:{colour(i)}">{escape(title(model))}</text>')
        for j, token in enumerate(pattern):
            parts.append(
                f'<rect x="{j * width:.2f}%" y="{y}" width="{width - 1:.2f}%" height="26" rx="4" style="fill:var(--rule)"/>'
                f'<text x="{(j + 0.5) * width - 0.5:.2f}%" y="{y + 18}" text-anchor="middle" class="on">{escape(token)}</text>'
            )
    return Chart("The layers of each model", "".join(parts), 32 * len(models), 102, 0)
