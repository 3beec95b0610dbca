"""The state of a study while it runs, as a live table in a terminal and as lines elsewhere."""

import contextlib
import dataclasses
import math
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .cells import Cell, Point
from .job import Job
from .queue import Entry, Queue
from .statistics import best_rate, has_score, score
from .store import Failure, Result, Store

__all__ = ["Row", "Snapshot", "named", "snapshot", "watching"]

_EVERY = 1.0  # seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """A point while a study runs.

    Attributes:
        name: The point's.
        cells: Its cells, as far as is known: all rates, and once more per further seed.
        done: Those that have a result.
        running: Those at work.
        failed: Those given up.
        rate: The rate that is best on validation, of those done.
        test: The mean score on test at that rate.
        seeds: The number of results behind it.
        steps_per_second: Of all that run.
        seconds_left: Of one worker, for what is left; ``None`` before anything is known of it.
        problem: Why nothing of it is trained.
    """

    name: str
    cells: int
    done: int
    running: int
    failed: int
    rate: float | None
    test: float | None
    seeds: int
    steps_per_second: float | None
    seconds_left: float | None
    problem: str | None

    @property
    def state(self) -> str:
        """Return one word for it."""
        if self.problem:
            return "cannot be"
        if self.running:
            return "running"
        if self.done + self.failed >= self.cells:
            return "done" if self.done else "failed"
        return "waiting"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A study at a moment."""

    rows: list[Row]
    results: list[Result]
    failures: list[Failure]
    retried: dict[str, str]  # by cell, what its first attempt has failed of

    @property
    def done(self) -> int:
        """Return the number of cells that are done."""
        return len(self.results)

    @property
    def cells(self) -> int:
        """Return the number of cells that are wanted."""
        return sum(row.cells for row in self.rows)

    @property
    def running(self) -> int:
        """Return the number of cells that run."""
        return sum(row.running for row in self.rows)

    @property
    def seconds_left(self) -> float | None:
        """Return the time that is left if as many cells go on side by side as do now; ``None`` before anything is known."""
        known = [row.seconds_left for row in self.rows if row.seconds_left is not None]
        return sum(known) / max(1, self.running) if known else None


def snapshot(job: Job, store: Store, queue: Queue) -> Snapshot:
    """Look at the results and the queue of a study."""
    entries = queue.entries()
    given_up = {key for key, entry in entries.items() if entry.given_up}
    rows: list[Row] = []
    results: dict[str, Result] = {}
    failures: dict[str, Failure] = {}
    retried: dict[str, str] = {}
    usual = _seconds([r for point in job.points for r in store.results(job.first(point))])
    for point in job.points:
        cells = {store.key(cell): cell for cell in job.cells(point, store, given_up)}
        found = {key: result for key, cell in cells.items() if (result := store.get(cell))}
        results |= found
        lost = {key: entries[key] for key in cells if key in given_up and key not in found}
        for key, entry in lost.items():
            log = store.folder_of(key) / "log.txt"
            failures[key] = Failure(cells[key], entry.error or "no reason is known", log, entry.errors or entry.deaths)
        left = {key: entries.get(key, Entry()) for key in cells if key not in found and key not in lost}
        running = {key: entry for key, entry in left.items() if entry.state == "running"}
        retried |= {named(cells[key]): entry.error for key, entry in left.items() if entry.errors and entry.error}
        rows.append(_row(job, point, list(found.values()), (len(lost), left, running), usual))
    return Snapshot(rows, list(results.values()), list(failures.values()), retried)


def _row(job: Job, point: Point, found: list[Result], rest: tuple[int, dict, dict], usual: float | None) -> Row:
    lost, left, running = rest
    scored = [result for result in found if has_score(result)]
    total = 0 if point.problem else len(point.rates) + (len(job.seeds) - 1 if scored or left else 0)
    rate = best_rate(found) if scored else None
    scores = [score(result, "test") for result in scored if result.cell.rate == rate]
    seconds = _seconds(found) or usual
    ahead = max(0, total - len(found) - lost)
    speeds = [entry.pulse["steps_per_second"] for entry in running.values() if entry.pulse.get("steps_per_second")]
    time_left: float | None = None if ahead else 0.0
    if seconds is not None:
        steps = point.train.get("steps") or 1
        shares = (min(1.0, (entry.pulse.get("step") or 0) / steps) for entry in running.values())
        time_left = seconds * max(0.0, ahead - sum(shares))
    elif speeds and point.train.get("steps"):
        time_left = ahead * point.train["steps"] * len(speeds) / sum(speeds)
    return Row(
        point.name, total, len(found), len(running), lost, rate, statistics.fmean(scores) if scores else None, len(scores),
        sum(speeds) if speeds else None, time_left, point.problem,
    )  # fmt: skip


def _seconds(results: list[Result]) -> float | None:
    known = [float(r.result["seconds"]) for r in results if isinstance(r.result.get("seconds"), int | float)]
    return statistics.fmean(known) if known else None


@contextlib.contextmanager
def watching(look: Callable[[], Snapshot], title: str, quiet: bool = False) -> Iterator[None]:
    """Show a study while the block runs: a live table if standard error is a terminal, else a line for every cell that ends.

    What cannot be looked at is left out of the picture, and tried again: the work itself says what is wrong.
    """
    from rich.console import Console

    if quiet:
        yield
        return
    # not sys.stderr, which is a cell's log while one is trained here
    console = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)
    ended = threading.Event()
    shower = _Live(console, title) if console.is_terminal else _Lines(console, title)
    before = _look(look)
    shower.begin(before)

    def show() -> None:
        while not ended.wait(_EVERY):
            if (now := _look(look)) is not None:
                shower.show(now)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        last = _look(look)
        if last is not None:
            shower.show(last)
        shower.end()


def _look(look: Callable[[], Snapshot]) -> Snapshot | None:
    try:
        return look()
    except (OSError, ValueError):
        return None


class _Lines:
    def __init__(self, console: Any, title: str):
        self.console, self.title = console, title
        self.seen: set[Any] = set()

    def begin(self, now: Snapshot | None) -> None:
        if now is not None:
            self.console.print(f"{self.title}: {now.done} of {now.cells} cells are done")
            self.seen = {r.path for r in now.results} | {f.log for f in now.failures} | {*now.retried.items()}

    def show(self, now: Snapshot) -> None:
        for result in now.results:
            if self._is_new(result.path):
                self.console.print(f"{now.done}/{now.cells}  {named(result.cell)}: {_said(result)}")
        for failure in now.failures:
            if self._is_new(failure.log):
                self.console.print(f"given up  {named(failure.cell)}: {failure.error} ({failure.log})")
        for item in now.retried.items():
            if self._is_new(item):
                self.console.print(f"tried again  {item[0]}: {item[1]}")

    def end(self) -> None:
        pass

    def _is_new(self, thing: Any) -> bool:
        new = thing not in self.seen
        self.seen.add(thing)
        return new


def _said(result: Result) -> str:
    if not has_score(result):
        return f"diverged, at step {result.result.get('steps')} the last time"
    metric, seconds = result.result["metric"], result.result.get("seconds", math.nan)
    return f"{metric} {score(result, 'test'):.4g} in {seconds:.0f} s"


class _Live:
    def __init__(self, console: Any, title: str):
        from rich.live import Live

        self.console, self.title = console, title
        self.live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def begin(self, now: Snapshot | None) -> None:
        self.live.start()
        if now is not None:
            self.show(now)

    def show(self, now: Snapshot) -> None:
        self.live.update(table(now, self.title, self.console.height - 6), refresh=True)

    def end(self) -> None:
        self.live.stop()


def table(now: Snapshot, title: str, height: int = 1000) -> Any:
    """Return rich's table of a study's points; where there is no room for all, those come first of which there is news."""
    from rich.table import Table

    shown = Table(title=title, caption=f"{now.done} of {now.cells} cells, {clock(now.seconds_left)} left")
    for name in ("point", "state", "cells", "best rate", "test", "steps/s", "left"):
        shown.add_column(name, justify="left" if name in ("point", "state") else "right", no_wrap=True)
    rows = now.rows
    if len(rows) > height:
        order = {"running": 0, "failed": 1, "done": 2, "waiting": 3, "cannot be": 4}
        rows = sorted(rows, key=lambda row: order[row.state])[: max(1, height - 1)]
    for row in rows:
        tested = "" if row.test is None else f"{row.test:.4f} ({row.seeds})"
        shown.add_row(
            row.name, row.state + (f", {row.failed} failed" if row.failed and row.state != "failed" else ""),
            f"{row.done}/{row.cells}", "" if row.rate is None else f"{row.rate:g}", tested,
            "" if row.steps_per_second is None else f"{row.steps_per_second:.1f}", clock(row.seconds_left),
        )  # fmt: skip
    if len(rows) < len(now.rows):
        shown.add_row(f"... and {len(now.rows) - len(rows)} more", *[""] * 6)
    return shown


def clock(seconds: float | None) -> str:
    """Return seconds as hours, minutes and seconds."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def named(cell: Cell) -> str:
    """Return a cell's point, rate and seed."""
    return f"{cell.point.name}, rate {cell.rate:g}, seed {cell.seed}"
