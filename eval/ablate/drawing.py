"""Pictures by matplotlib that a page can hold: text stays text, colours follow the reader's theme, and marks have tooltips.

The charts of :mod:`hybridzoo.zoo.report.charts` have no error bars, logarithmic axes or bands, so all pictures of a study are drawn here.
Matplotlib draws in colours that stand for names; :meth:`Canvas.svg` puts the variables of ``chart.css`` in their place.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

from ...zoo.lazily import needed
from ...zoo.report.charts import style
from ...zoo.tables import in_bytes, in_units

__all__ = [
    "CARD",
    "INK",
    "MARKS",
    "SOFT",
    "Canvas",
    "alone",
    "bytes_axis",
    "canvas",
    "context_axis",
    "counts_axis",
    "series_colour",
]

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
# no two of them are drawn by anything else; what is drawn in them can still be seen where there is no style sheet
INK, SOFT, RULE, CARD = "#1c1b1b", "#66625e", "#e5e1db", "#fffffe"
_SERIES = ("#0072b3", "#c24e01", "#00805d", "#a4508c", "#8a6d01", "#4a6fe4")
_NAMES = {INK: "--ink", SOFT: "--soft", RULE: "--rule", CARD: "--card"} | {c: f"--c{i}" for i, c in enumerate(_SERIES)}
MARKS = "osD^vP"
# one unit is a pixel where the picture has its own width, which is that of a column on a phone or half a page on a desk
_WIDTH, _TEXT = 380, 12.5
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hybridzoo",
    "svg.image_inline": True,
    "font.family": "DejaVu Sans",  # wider than what browsers take, so nothing is cut off
    "font.size": _TEXT,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.labelsize": _TEXT,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 1.0,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": _TEXT - 0.5,
    "ytick.labelsize": _TEXT - 0.5,
    "xtick.minor.visible": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 7,
    "legend.frameon": False,
    "legend.fontsize": _TEXT - 0.5,
    "legend.handlelength": 1.4,
    "figure.constrained_layout.use": True,
}


def series_colour(number: int) -> str:
    """Return the colour of a series, the one that charts of other pages have for it."""
    return _SERIES[number % len(_SERIES)]


class Canvas:
    """A picture in the making.

    Attributes:
        figure: Matplotlib's figure.
        axes: Its axes.
    """

    def __init__(self, height: float) -> None:
        figure = needed("matplotlib.figure", "draws the pictures of a report", "'hybridzoo[ablate]'").Figure
        self.figure: Any = figure(figsize=(_WIDTH / 72, height / 72))
        self.axes: Any = self.figure.add_subplot()
        self._tips: dict[str, str] = {}

    def tip(self, artist: Any, text: str) -> None:
        """Give what is drawn a tooltip."""
        name = f"tip-{len(self._tips)}"
        artist.set_gid(name)
        self._tips[name] = text

    def inside(self, text: Any) -> None:
        """Leave out the halo that sets text off from lines, where it stands in a shade."""
        text.set_gid("inside")

    def key(self, title: str = "") -> None:
        """Put a legend above the axes, in as many columns as there is room for; the picture grows by it."""
        handles, names = self.axes.get_legend_handles_labels()
        if not names:
            return
        columns = max(1, min(len(names), int(_WIDTH / (36 + 0.58 * _TEXT * max(map(len, names))))))
        legend = self.figure.legend(
            handles, names, loc="outside upper left", ncols=columns, columnspacing=1.0, labelcolor=INK, title=title or None,
            alignment="left", title_fontproperties={"size": _TEXT - 0.5}, labelspacing=0.3, borderpad=0.1, handletextpad=0.5,
        )  # fmt: skip
        legend.get_title().set_color(SOFT)
        rows = -(-len(names) // columns) + bool(title)
        self.figure.set_size_inches(_WIDTH / 72, self.figure.get_figheight() + 17 * rows / 72)

    def svg(self, label: str) -> str:
        """Return the picture as an SVG element; ``label`` says the same in words, for who cannot see it."""
        import io

        out = io.StringIO()
        self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        ElementTree.register_namespace("", _SVG)
        root = ElementTree.fromstring(out.getvalue())
        used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", out.getvalue()))
        for parent in list(root.iter()):
            self._cleaned(parent, used)
        _, _, width, height = root.attrib["viewBox"].split()
        root.attrib = {
            "class": "chart plot",
            "viewBox": root.attrib["viewBox"],
            "width": width,
            "height": height,
            "role": "img",
            "aria-label": label,
        }
        return ElementTree.tostring(root, encoding="unicode")

    def _cleaned(self, element: ElementTree.Element, used: set[str]) -> None:
        for child in list(element):
            if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
                element.remove(child)
        name = element.attrib.get("id")
        if name in self._tips:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = self._tips[name]
            element.insert(0, title)
        if name == "inside":
            for text in element.iter(f"{{{_SVG}}}text"):
                text.attrib["class"] = "on"
        # several pictures of one page have the same names for their parts; those referred to are digests of what they hold
        if name is not None and name not in used:
            del element.attrib["id"]
        if _LINK in element.attrib:
            element.attrib["href"] = element.attrib.pop(_LINK)
        if "style" in element.attrib:
            element.attrib["style"] = _themed(element.attrib["style"])


@contextlib.contextmanager
def canvas(height: float = 270) -> Iterator[Canvas]:
    """Draw on a canvas within this project's style of matplotlib, which goes back to what it was at the end."""
    matplotlib = needed("matplotlib", "draws the pictures of a report", "'hybridzoo[ablate]'")
    with matplotlib.rc_context(_STYLE):
        yield Canvas(height)


def alone(svg: str) -> str:
    """Return a picture as a file of its own, on a card, with the style sheet that it needs."""
    head, body = svg.split(">", 1)
    font = ' font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif"'
    return f'{head}{font}>\n<style>\n{style()}</style>\n<rect width="100%" height="100%" rx="8" style="fill:var(--card)"/>{body}\n'


def bytes_axis(axes: Any, side: str) -> None:
    """Make the axis at a side, ``"x"`` or ``"y"``, one of KiB, MiB and GiB: in powers of two where there are some, else from zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

    axis = axes.xaxis if side == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    if high >= 6 * low:
        axes.set(**{f"{side}scale": "log"})
        axis.set(major_locator=LogLocator(base=2, numticks=6), minor_locator=NullLocator())
    else:
        axes.set(**{f"{side}lim": (0, 1.06 * high)})
        axis.set_major_locator(MultipleLocator(2.0 ** math.floor(math.log2(high / 3))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes(value).replace(".0 ", " ") or "0"))


def counts_axis(axes: Any) -> None:
    """Make the left axis logarithmic, with ticks at 1, 2 and 5 times powers of ten: ``200 k``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=30), minor_locator=NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_units(value)))


def context_axis(axes: Any, places: Sequence[float]) -> None:
    """Label the lower axis by lengths, on a scale of powers of two where they are far apart: ``8,192``, ``16 Ki``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(places) > 0 and max(places) >= 8 * min(places):
        axes.set_xscale("log", base=2)
        axes.xaxis.set(major_locator=LogLocator(base=2, numticks=7), minor_locator=NullLocator())
    elif len({*places}) <= 6:
        axes.set_xticks(sorted({*places}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:,g} Ki" if x >= 10_000 else f"{x:,g}"))


def _themed(text: str) -> str:
    """Put names in place of colours, and leave the font's family to the page."""
    kept = [part.strip() for part in text.split(";") if part.strip() and "font-family" not in part]
    return "; ".join(re.sub(r"#[0-9a-f]{6}", lambda found: _named(found[0]), part) for part in kept)


def _named(colour: str) -> str:
    return f"var({_NAMES[colour]})" if colour in _NAMES else colour
