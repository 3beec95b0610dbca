"""The demo's page: its headline, charts, table and samples, from the results alone."""

from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from ...zoo.report.blocks import card, facts, filled, page, sample, table
from ...zoo.report.charts import Bar, Chart, bars, line_chart
from ..result_file import write

__all__ = ["headline", "losses", "measures", "title", "write_page"]

Results = dict[str, Any]


def write_page(results: Results, path: Path) -> Path:
    """Write the page, and beside it the results as JSON; return the path."""
    models, tasks, data = results["models"], results["tasks"], path.with_suffix(".json")
    blocks = {
        "headline": escape(headline(results)),
        "models": "".join(_model(i, m) for i, m in enumerate(models)),
        "losses": losses(results).html(),
        "text": _text(results).html(),
        "recall": "".join(card(t["title"], f"<p>{escape(t['about'])}</p>{_recall(results, t).html()}") for t in tasks),
        "table": _table(results),
        "json": escape(data.name),
        "commands": escape("\n".join(m["command"] for m in models)),
        "samples": "".join(sample(title(m), results["prompt"], m["sample"], i) for i, m in enumerate(models)),
        "facts": facts(results["facts"]),
    }
    body = filled(Path(__file__).with_name("page.html").read_text(encoding="utf-8"), blocks)
    write(results, data)
    path.write_text(page(f"hybridzoo: {' · '.join(m['name'] for m in models)}", body), encoding="utf-8")
    return path


def headline(results: Results) -> str:
    """Return the outcome in a sentence: who needs the fewest bits for unseen text, and who recalls best."""
    models = results["models"]
    bits = {title(m): f"{m['bits_per_byte']:.2f}" for m in models}
    right = {title(m): f"{100 * fmean(m['accuracy'].values()):.0f}" for m in models}
    (text, readers), (recall, finders) = _leaders(bits, min), _leaders(right, max)
    if readers == finders:
        verb = "leads" if len(readers) == 1 else "lead"
        return f"{_and(readers)} {verb} in both: {text} bits per byte of unseen text, {recall} % of recall right"
    return (
        f"{_and(readers)} read{'s' * (len(readers) == 1)} unseen text best, at {text} bits per byte; "
        f"{_and(finders)} recall{'s' * (len(finders) == 1)} best, with {recall} % right"
    )


def title(model: dict[str, Any]) -> str:
    """Return a model's name for a reader."""
    return model["name"].removesuffix("-tiny").capitalize()


def _leaders(shown: dict[str, str], best: Any) -> tuple[str, list[str]]:
    # by the figures as they are shown: what looks the same is a tie
    value = best(shown.values(), key=float)
    return value, [name for name, v in shown.items() if v == value]


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _model(number: int, model: dict[str, Any]) -> str:
    active = f" ({model['active_params']:,} active)" if model["active_params"] != model["params"] else ""
    return card(
        title(model),
        f'<p class="code">{escape(model["name"])}: {escape(model["pattern"])}</p>'
        f"<p>{model['params']:,} parameters{active}<br>{model['tokens_per_second']:,.0f} tokens/s in training</p>",
        number,
    )


def losses(results: Results) -> Chart:
    """Return the training losses as curves."""
    models = results["models"]
    lines = [(title(m), [(h["step"] * m["tokens_per_step"] / 1e6, h["loss"]) for h in m["history"]]) for m in models]
    # the first steps, which only find out how often each byte occurs, would take most of the height
    settled = [y for _, points in lines for _, y in points[len(points) // 20 :]]
    y_range = 0.9 * min(settled), 1.05 * max(settled)
    label = "Training loss of each model over the tokens read"
    return line_chart(label, lines, "million tokens read", "loss, nats per target", y_range, smoothing=0.7)


def _text(results: Results) -> Chart:
    rows = [Bar(title(m), m["bits_per_byte"], f"{m['bits_per_byte']:.2f}", i) for i, m in enumerate(results["models"])]
    alone = results["text"]["unigram_bits_per_byte"]
    top = max(alone, *(row.value for row in rows))
    return bars("Bits per byte of held-out text", rows, top, (f"byte frequencies alone: {alone:.2f}", alone))


def _recall(results: Results, task: dict[str, Any]) -> Chart:
    right = [100 * m["accuracy"][task["name"]] for m in results["models"]]
    rows = [Bar(title(m), v, f"{v:.0f} %", i) for i, (m, v) in enumerate(zip(results["models"], right, strict=True))]
    chance = 100 * task["chance"]
    return bars(f"Accuracy of each model: {task['title']}", rows, 100, (f"guessing: {chance:.3g} %", chance))


def measures(results: Results) -> list[list[str]]:
    """Return all numbers: of each measure its name, the models' values, and what there is without a model."""
    models, alone = results["models"], results["text"]["unigram_bits_per_byte"]
    return [
        ["parameters", *(f"{m['params']:,}" for m in models), ""],
        ["tokens/s", *(f"{m['tokens_per_second']:,.0f}" for m in models), ""],
        ["bits/byte", *(f"{m['bits_per_byte']:.3f}" for m in models), f"{alone:.3f}"],
        *(
            [f"{t['title']}, %", *(f"{100 * m['accuracy'][t['name']]:.1f}" for m in models), f"{100 * t['chance']:.1f}"]
            for t in results["tasks"]
        ),
    ]


def _table(results: Results) -> str:
    rows, best = measures(results), set()
    for i, (measure, *cells) in list(enumerate(rows))[2:]:
        shown = [float(cell) for cell in cells[:-1]]
        leader = min(shown) if measure == "bits/byte" else max(shown)
        best |= {(i, j) for j, value in enumerate(shown, 1) if value == leader}
    return table(["", *(title(m) for m in results["models"]), "guess"], rows, best)
