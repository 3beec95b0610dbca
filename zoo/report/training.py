"""The page of a training run and a picture of its losses, from what ``train.json`` holds: settings, facts and what was logged."""

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean, median
from typing import Any

from .blocks import card, facts, page
from .charts import Chart, Mark, line_chart, picture
from .confusion import confusion_blocks

__all__ = ["duration", "headline", "losses", "training_page", "training_picture"]

Log = dict[str, Any]
Points = list[tuple[float, float]]
# steps between two points of a curve hide what is between them; of more curves than this, the mean and the extreme say more
_MOST_LINES = 6


def training_page(log: Log) -> str:
    """Return the page of a run: ``about`` and ``history`` as :mod:`~hybridzoo.zoo.train.run_folder` writes them, maybe ``confusion``."""
    about = log.get("about", {})
    found = about.get("facts", {})
    parts = [
        f'<p class="kicker">{escape(about.get("folder", "A training run"))}</p>',
        f"<h1>{escape(headline(log))}</h1>",
        f'<p class="lead">{escape(_lead(log))}</p>',
        f'<section class="cards figures">{"".join(_figures(log))}</section>',
    ]
    if _points(log, "loss"):
        held = " The best on what is held out is marked." if _points(log, "eval_loss") else ""
        parts += [
            "<h2>Learning</h2>",
            f'<p class="note">Nats per target, the mean over the steps between two points and a running mean of those.{held}</p>',
            f"<figure>{losses(log).html()}</figure>",
        ]
    if log.get("confusion"):
        parts += confusion_blocks(log["confusion"])
    if small := _small(log):
        parts += ["<h2>On the way</h2>", '<p class="note">Over the steps, as logged.</p>']
        parts.append(f'<section class="cards wide">{"".join(small)}</section>')
    parts += ["<h2>The run</h2>", f"<dl>{facts(found | _measured(log))}</dl>"]
    if about.get("command"):
        parts += ["<h2>Again</h2>", f"<pre>{escape(about['command'])}</pre>"]
    return page(f"hybridzoo: {_name(log)}", "\n".join(parts))


def training_picture(log: Log) -> str:
    """Return an SVG file with the losses of a run, and its rate of learning below them."""
    panels = [("loss", losses(log))]
    if right := _points(log, "eval_accuracy"):
        panels.append((f"accuracy on held-out {_answers(log)}", _accuracies(right)))
    if rates := _points(log, "learning_rate"):
        panels.append(("learning rate", _chart("Learning rate", rates)))
    return picture(headline(log), panels)


def headline(log: Log) -> str:
    """Return the outcome in a sentence: the loss or the accuracy that was reached, on what is held out where there is something."""
    name, steps = _name(log), log.get("about", {}).get("steps", 0)
    best_at, read = _best(log), _points(log, "loss")
    if best_at is not None:
        at, best = best_at
        if right := dict(_points(log, "eval_accuracy")).get(at):
            return f"{name}: {right:.2%} of the {_answers(log)} that it has not seen are told right, at step {at:,.0f} of {steps:,}"
        return f"{name}: {best:.3f} {_loss(log)} of {_data(log)} it has not seen, at step {at:,.0f} of {steps:,}"
    if not read:
        return f"{name}: nothing logged yet"
    at, last = read[-1]
    return f"{name}: a loss of {last:.3f} after {'all ' if at >= steps else ''}{at:,.0f} steps" + (
        f" of {steps:,}" if at < steps else ""
    )


def losses(log: Log) -> Chart:
    """Return the losses as curves over the steps."""
    read, held = _points(log, "loss"), _points(log, "eval_loss")
    lines = [("training", read), *([("held out", held)] if held else [])]
    # the first steps, which only find out how often each token occurs, would take most of the height
    settled = [y for _, points in lines for _, y in points[len(points) // 20 :]]
    low, high = min(settled), max(settled)
    room = 0.05 * (high - low) or 0.5
    marks = []
    if (best := _best(log)) is not None:
        x, y = best
        marks.append(Mark(x, y, f"{y:.3f}", 1))
    elif len(read) == 1:
        marks.append(Mark(*read[0], "", 0))
    weight = 0.6 if len(read) > 20 else 0.0
    label = "Loss over the steps" + (f", in training and on held-out {_data(log)}" if held else "")
    return line_chart(label, lines, "steps", _loss(log), (low - room, high + room), [weight, 0.0], marks)


def duration(seconds: float) -> str:
    """Return a time in the words of a clock: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{hours} h {minutes} min"


def _name(log: Log) -> str:
    return str(log.get("about", {}).get("name") or "model")


def _points(log: Log, key: str) -> Points:
    entries = ((entry.get("step"), entry.get(key)) for entry in log.get("history", []))
    return [(float(x), float(y)) for x, y in entries if _is_finite(x) and _is_finite(y)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _unit(log: Log) -> str:
    """The plural of what is read: tokens, images or vectors."""
    return str(log.get("about", {}).get("unit") or "tokens")


def _data(log: Log) -> str:
    return {"images": "images", "vectors": "rows"}.get(_unit(log), "text")


def _answers(log: Log) -> str:
    return "images" if _unit(log) == "images" else "answers"


def _loss(log: Log) -> str:
    """The unit of the losses."""
    return "squared error" if _unit(log) == "vectors" else f"nats per {_unit(log)[:-1]}"


def _best(log: Log) -> tuple[float, float] | None:
    """The step of the best evaluation, as :func:`~hybridzoo.zoo.train.evaluation.best_of` has it, and its loss."""
    held, right = _points(log, "eval_loss"), dict(_points(log, "eval_accuracy"))
    return min(held, key=lambda point: (-right.get(point[0], 0), point[1]), default=None)


def _lead(log: Log) -> str:
    about, steps = log.get("about", {}), [x for x, _ in _points(log, "loss")]
    done = steps[-1] if steps else 0
    ended = "" if log.get("finished") or done >= about.get("steps", 0) else ", and not at its end yet"
    units = done * about.get(f"{_unit(log)}_per_step", 0)
    again = about.get("resumed") or []
    resumed = f" Resumed at step {_and([f'{step:,}' for step in again])}." if again else ""
    return f"{_amount(units)} {_unit(log)} read in {duration(_seconds(log))}{ended}.{resumed}"


def _seconds(log: Log) -> float:
    logged = [
        entry["seconds"] for entry in log.get("history", []) if "loss" in entry and _is_finite(entry.get("seconds"))
    ]
    return max([float(log.get("seconds") or 0), *logged])


def _amount(value: float) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _figures(log: Log) -> list[str]:
    """Cards with the numbers that one looks for first."""
    read, unit = _points(log, "loss"), _unit(log)
    shown = []
    if read:
        last = fmean(y for _, y in read[-max(1, len(read) // 20) :])
        shown.append(("Training loss", f"{last:.3f}", f"{_loss(log)}, mean of the last twentieth"))
    if (best := _best(log)) is not None:
        shown += _judged(log, *best)
    if rate := _typical(log, f"{unit}_per_second"):
        mfu = _typical(log, "mfu")
        shown.append(
            ("Speed", f"{rate:,.0f}", f"{unit}/s" + (f", {100 * mfu:.1f} % of the device (MFU)" if mfu else ""))
        )
    if memory := _points(log, "memory_GiB"):
        shown.append(("Memory", f"{max(y for _, y in memory):.1f} GiB", "of the GPU, at most"))
    return [card(title, f'<p class="big">{escape(value)}</p><p>{escape(note)}</p>') for title, value, note in shown]


def _judged(log: Log, at: float, loss: float) -> list[tuple[str, str, str]]:
    """The card of the best evaluation: its title, a number and a note."""
    right, five, bits = (
        dict(_points(log, key)).get(at) for key in ("eval_accuracy", "eval_accuracy_top5", "eval_bits_per_byte")
    )
    if right is not None:
        among = f"{five:.2%} among the first five; " if five is not None else ""
        return [("Held-out accuracy", f"{right:.2%}", f"best, at step {at:,.0f}; {among}loss {loss:.3f}")]
    if _unit(log) == "vectors":
        note = f"root {math.sqrt(loss):.3f}"
    else:
        note = f"{bits:.3f} bits per byte" if bits else f"perplexity {math.exp(min(loss, 99)):,.4g}"
    return [("Held-out loss", f"{loss:.3f}", f"best, at step {at:,.0f}; {note}")]


def _typical(log: Log, key: str) -> float:
    values = [y for _, y in _points(log, key)]
    return median(values) if values else 0.0


def _small(log: Log) -> list[str]:
    """Cards with the curves of what else was logged."""
    shown = [
        ("Learning rate", "learning_rate", "The peak is what --lr says."),
        ("Gradient norm", "grad_norm", "Before it is clipped."),
        ("Tokens per second", "tokens_per_second", "Real tokens, without padding, saving and evaluating."),
        ("Images per second", "images_per_second", "Without saving and evaluating."),
        ("Vectors per second", "vectors_per_second", "Without saving and evaluating."),
        ("Balance of the experts", "aux_loss", "The auxiliary losses, weighted as they are in the loss."),
    ]
    cards = []
    if right := _points(log, "eval_accuracy"):
        cards.append(
            card("Accuracy", f"<p>On {_answers(log)} that are held out, in per cent.</p>{_accuracies(right).html()}")
        )
    for title, key, note in shown:
        if points := _points(log, key):
            cards.append(card(title, f"<p>{escape(note)}</p>{_chart(title, points, _settled(points)).html()}"))
    if loads := _loads(log):
        note = "Tokens of the busiest expert over an equal share; 1 is perfect balance."
        most = max(y for _, points in loads for _, y in points)
        chart = line_chart("Load of the busiest expert", loads, "", "", (1.0, max(1.1, 1.03 * most)), 0.6, plot=120)
        cards.append(card("Expert load", f"<p>{note}</p>{chart.html()}"))
    return cards


def _chart(title: str, points: Points, y_range: tuple[float, float] | None = None) -> Chart:
    marks = [Mark(*points[0], "", 0)] if len(points) == 1 else []
    top = max(y for _, y in points)
    y_range = y_range or (min(0.0, *(y for _, y in points)), 1.06 * top if top > 0 else 1.0)
    return line_chart(f"{title} over the steps", [("", points)], "", "", y_range, marks=marks, plot=120)


def _accuracies(points: Points) -> Chart:
    """The share of right answers in per cent, from a little below the second evaluation's on: the first only finds its way."""
    shares = [(x, 100 * y) for x, y in points]
    low = min(y for _, y in shares[1:] or shares)
    marks = [Mark(*shares[0], "", 0)] if len(shares) == 1 else []
    label = "Share of right answers on what is held out, over the steps"
    return line_chart(label, [("", shares)], "", "", (max(0.0, low - 2), 100.0), marks=marks, plot=120)


def _settled(points: Points) -> tuple[float, float] | None:
    # a few wild first values are cut off where they would flatten all others
    values = sorted(y for _, y in points)
    usual = values[min(len(values) - 1, round(0.98 * len(values)))]
    return (min(0.0, values[0]), 1.1 * usual) if usual > 0 else None


def _loads(log: Log) -> list[tuple[str, Points]]:
    keys = sorted(
        {key for entry in log.get("history", []) for key in entry if key.startswith("expert_load/")}, key=_layer
    )
    lines = [(f"block {_layer(key)}", _points(log, key)) for key in keys]
    lines = [line for line in lines if line[1]]
    if len(lines) <= _MOST_LINES:
        return lines
    by_step: dict[float, list[float]] = {}
    for _, points in lines:
        for x, y in points:
            by_step.setdefault(x, []).append(y)
    return [
        ("mean", [(x, fmean(ys)) for x, ys in by_step.items()]),
        ("worst", [(x, max(ys)) for x, ys in by_step.items()]),
    ]


def _layer(key: str) -> int:
    number = key.rsplit("/", 1)[1]
    return int(number) if number.isdigit() else -1


def _measured(log: Log) -> dict[str, str]:
    about = log.get("about", {})
    found = {"time": duration(_seconds(log))}
    if again := about.get("resumed"):
        found["resumed"] = f"at step {_and([f'{step:,}' for step in again])}"
    return found
