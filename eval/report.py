"""One page that shows a comparison: pictures, table, samples; a single HTML file that needs nothing else.

The pictures are SVG inside the page, and take its text colour and font, so they follow the reader's light or dark theme.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_report"]

# distinguishable with the common colour blindnesses (Okabe and Ito), and on white as on black
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# stands for "the page's text colour" until the SVG is written
_INK = "#010203"


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the page.

    Args:
        results: What :func:`hybridzoo.eval.demo.run.run` collects.
        path: The HTML file.

    Returns:
        The path.
    """
    models = results["models"]
    blocks = {
        "title": " · ".join(m["name"] for m in models),
        "tiles": "".join(_tile(m, _COLOURS[i]) for i, m in enumerate(models)),
        "losses": _picture(
            lambda ax: _draw_losses(ax, models), (8.2, 3.4), "Training loss of each model over the tokens read"
        ),
        "text": _picture(
            lambda ax: _draw_text(ax, models, results["text"]),
            (8.2, 0.62 * len(models) + 1.1),
            "Bits per byte of held-out text",
        ),
        "recall": _picture(
            lambda ax: _draw_recall(ax, results["tasks"], models), (8.2, 3.6), "Accuracy of each model on each task"
        ),
        "tasks": "".join(_task(t) for t in results["tasks"]),
        "table": _table(results),
        "commands": _safe("\n".join(m["command"] for m in models)),
        "samples": "".join(_sample(m, results["prompt"], _COLOURS[i]) for i, m in enumerate(models)),
        "facts": "".join(f"<dt>{_safe(k)}</dt><dd>{_safe(v)}</dd>" for k, v in results["facts"].items()),
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: blocks[m[1]], template)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _picture(draw: Callable[[Any], None], size: tuple[float, float], label: str) -> str:
    import matplotlib

    # the object API and a fixed salt: no global state, no display, the same picture from the same numbers
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": label, "font.size": 10.5, "text.color": _INK, "axes.edgecolor": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.subplots()
        ax.patch.set_alpha(0)
        draw(ax)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]+", r"\1 inherit", svg).replace(_INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px inherit", r"font-size: \1px", svg)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1
    )


def _draw_losses(ax: Any, models: Sequence[dict[str, Any]]) -> None:
    for i, model in enumerate(models):
        points = [(h["step"] * model["tokens_per_step"] / 1e6, h["loss"]) for h in model["history"]]
        x, y = [p[0] for p in points], [p[1] for p in points]
        ax.plot(x, y, color=_COLOURS[i], linewidth=0.7, alpha=0.35)
        ax.plot(x, _smooth(y), color=_COLOURS[i], linewidth=2, label=model["name"])
    ax.set_xlabel("million tokens read")
    ax.set_ylabel("loss, nats per target")
    ax.set_xlim(left=0)
    # the first steps, which only find out how often each byte occurs, would take most of the height
    settled = [h["loss"] for m in models for h in m["history"][len(m["history"]) // 20 :]]
    ax.set_ylim(0.9 * min(settled), 1.05 * max(settled))
    ax.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    ax.legend(loc="upper right")


def _smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    # an exponential mean that starts at the first value's level
    out, mean, norm = [], 0.0, 0.0
    for v in values:
        mean, norm = weight * mean + (1 - weight) * v, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def _draw_text(ax: Any, models: Sequence[dict[str, Any]], text: dict[str, Any]) -> None:
    for i, model in enumerate(models):
        value = model["bits_per_byte"]
        ax.barh(i, value, color=_COLOURS[i], height=0.62)
        ax.annotate(
            f"{value:.2f}", (value, i), xytext=(5, 0), textcoords="offset points", va="center", fontweight="bold"
        )
    baseline = text["unigram_bits_per_byte"]
    ax.axvline(baseline, color=_INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
    ax.annotate(
        f"byte frequencies alone: {baseline:.2f}",
        (baseline, -0.62),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        alpha=0.75,
    )
    ax.set_yticks(range(len(models)), [m["name"] for m in models])
    ax.set_ylim(len(models) - 0.5, -0.95)
    ax.set_xlim(0, baseline * 1.08)
    ax.set_xlabel("bits per byte of held-out text (less is better)")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _draw_recall(ax: Any, tasks: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> None:
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            value = 100 * model["accuracy"][task["name"]]
            at = j - 0.4 + (i + 0.5) * width
            ax.bar(at, value, width=0.92 * width, color=_COLOURS[i], label=model["name"] if j == 0 else None)
            ax.annotate(
                f"{value:.0f}", (at, value), xytext=(0, 3), textcoords="offset points", ha="center", fontweight="bold"
            )
    for j, task in enumerate(tasks):
        chance = 100 * task["chance"]
        ax.plot(
            [j - 0.42, j + 0.42],
            [chance] * 2,
            color=_INK,
            linewidth=1.2,
            linestyle=(0, (3, 2)),
            label="chance" if j == 0 else None,
        )
    ax.set_xticks(range(len(tasks)), [t["title"] for t in tasks])
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 118)
    ax.set_yticks([0, 25, 50, 75, 100])
    ax.set_ylabel("accuracy, %")
    ax.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(loc="upper center", ncols=len(models) + 1, bbox_to_anchor=(0.5, 1.14), handlelength=1.4)


def _safe(value: Any) -> str:
    return html.escape(str(value))


def _tile(model: dict[str, Any], colour: str) -> str:
    return (
        f'<article style="--c:{colour}"><h3>{_safe(model["name"])}</h3><p class="pattern">{_safe(model["pattern"])}</p>'
        f"<p>{model['params']:,} parameters"
        + (f" ({model['active_params']:,} active)" if model["active_params"] != model["params"] else "")
        + f"<br>{model['tokens_per_second']:,.0f} tokens/s in training</p></article>"
    )


def _task(task: dict[str, Any]) -> str:
    return f"<li><b>{_safe(task['title'])}.</b> {_safe(task['about'])} Chance: {100 * task['chance']:.1f} %.</li>"


def _table(results: dict[str, Any]) -> str:
    tasks = results["tasks"]
    head = "".join(
        f"<th>{_safe(h)}</th>" for h in ("model", "parameters", "tokens/s", "bits/byte", *(t["title"] for t in tasks))
    )
    rows = []
    for m in results["models"]:
        cells = [f"{m['params']:,}", f"{m['tokens_per_second']:,.0f}", f"{m['bits_per_byte']:.3f}"]
        cells += [f"{100 * m['accuracy'][t['name']]:.1f} %" for t in tasks]
        rows.append(f"<tr><th>{_safe(m['name'])}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    chance = ["", "", f"{results['text']['unigram_bits_per_byte']:.3f}", *(f"{100 * t['chance']:.1f} %" for t in tasks)]
    rows.append('<tr class="chance"><th>without a model</th>' + "".join(f"<td>{c}</td>" for c in chance) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _sample(model: dict[str, Any], prompt: str, colour: str) -> str:
    return (
        f'<article style="--c:{colour}"><h3>{_safe(model["name"])}</h3>'
        f'<pre><span class="prompt">{_safe(prompt)}</span>{_safe(model["sample"])}</pre></article>'
    )
