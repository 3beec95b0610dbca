"""The plan of a study: what its points cost and how long they take, before anything is trained."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from ...zoo.models.build import build
from ...zoo.models.stats import stats
from ...zoo.tables import columns, in_bytes, in_units
from ...zoo.terminal import counted
from .cells import Point
from .points import points_of, rows_of
from .schema import StudySpec

__all__ = ["Plan", "Planned", "plan_of", "spent"]

LENGTHS = (4096, 32_768, 262_144)
# what is assumed of a training step until one has been timed: FLOP/s of small matrices, seconds of a step besides, and per block
_ASSUMED = {"cpu": (5.0e9, 5.0e-3, 2.0e-3), "cuda": (5.0e13, 2.0e-3, 5.0e-4)}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A point as it is planned.

    Attributes:
        point: The point.
        blocks: Residual blocks; 0 where it has a problem, and so for what follows.
        state_bytes: What a sequence leaves behind, by its tokens.
        steps: Of each of its trainings.
        tokens: That each reads.
        seconds: That each is expected to take.
        cells: Its trainings: every rate with the first seed, and the best rate with the others.
    """

    point: Point
    blocks: int = 0
    state_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cells: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study's points with what they cost.

    Attributes:
        name: Of the study.
        scale: Of it.
        rows: One per point, in their order.
        how: How the seconds were come by, in words.
    """

    name: str
    scale: str
    rows: list[Planned]
    how: str

    @property
    def points(self) -> list[Point]:
        """The points, those with a problem included."""
        return [row.point for row in self.rows]

    @property
    def unmatched(self) -> list[Point]:
        """The points that are not trained, each with its ``problem``."""
        return [point for point in self.points if point.problem]

    @property
    def cells(self) -> int:
        """Trainings in all."""
        return sum(row.cells for row in self.rows)

    @property
    def flops(self) -> int:
        """FLOPs of all trainings."""
        return sum(row.cells * row.tokens * row.point.costs.flops for row in self.rows if row.point.costs)

    @property
    def seconds(self) -> float:
        """Seconds of all trainings one after another."""
        return sum(row.cells * row.seconds for row in self.rows)

    def table(self) -> Table:
        """The points that can be trained, for a terminal."""
        contexts = {point.costs.context for point in self.points if point.costs}
        # tasks of several lengths in one study: what each row leaves behind at its own
        several = len(contexts) > 1
        lengths = sorted({*LENGTHS} if several else {*contexts, *LENGTHS})
        at = [f"state at {length:,}" for length in lengths]
        states = ["state at its length", *at] if several else at
        heads = ["parameters", "active", "FLOPs/token", *states, "attention", "of blocks", "steps", "cells", "time"]
        table = columns("point", *heads, left=1)
        for row in self.rows:
            if (costs := row.point.costs) is None:
                continue
            asked = [costs.context, *lengths] if several else lengths
            states = [in_bytes(row.state_bytes[length]) or "0 B" for length in asked]
            of_mixers = "" if costs.attention_of_mixers is None else f"{costs.attention_of_mixers:.1%}"
            sizes = (in_units(costs.params, "B"), in_units(costs.active_params, "B"), in_units(costs.flops))
            shares = (of_mixers, f"{costs.attention_of_blocks:.1%}")
            table.add_row(
                row.point.name,
                *sizes,
                *states,
                *shares,
                f"{row.steps:,}",
                f"{row.cells}",
                spent(row.cells * row.seconds),
            )
        return table

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        rows = [
            {
                "point": row.point.name, "axes": row.point.axes, "problem": row.point.problem, "rates": list(row.point.rates),
                "costs": row.point.costs and dataclasses.asdict(row.point.costs), "state_bytes": row.state_bytes, "steps": row.steps,
                "tokens": row.tokens, "cells": row.cells, "seconds": round(row.cells * row.seconds, 1),
            }
            for row in self.rows
        ]  # fmt: skip
        return {
            "study": self.name, "scale": self.scale, "points": rows, "cells": self.cells, "flops": self.flops,
            "seconds": round(self.seconds, 1), "seconds_are": self.how, "unmatched": len(self.unmatched),
        }  # fmt: skip


def plan_of(spec: StudySpec, points: Sequence[Point] | None = None, results: Sequence[Any] = ()) -> Plan:
    """Plan a study; nothing is trained.

    Args:
        spec: The study.
        points: Those of :func:`~hybridzoo.eval.ablate.points.points_of`, where they are known.
        results: Trainings of the study that are done, whose speed is then expected of the others.
    """
    points = points_of(spec) if points is None else points
    clock = _Clock(results)
    return Plan(spec.name, spec.scale, [_planned(spec, point, clock) for point in points], clock.how)


def spent(seconds: float) -> str:
    """Return a time in words: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _planned(spec: StudySpec, point: Point, clock: "_Clock") -> Planned:
    if point.costs is None:
        return Planned(point)
    from .tasks import task_of

    model = build(point.config, device="meta")
    blocks, lengths = len(model.specs), {point.costs.context, *LENGTHS}
    steps = point.train["steps"]
    tokens = steps * rows_of(point.train) * task_of(point.task).tokens_per_example
    return Planned(
        point=point,
        blocks=blocks,
        state_bytes={n: stats(model, n).state_bytes for n in sorted(lengths)},
        steps=steps,
        tokens=tokens,
        seconds=clock.seconds(point, blocks, steps, tokens),
        cells=len(point.rates) + len(spec.seeds) - 1,
    )


class _Clock:
    """Expected seconds of trainings: those of the point itself that were measured, or of others, or what is assumed of the device."""

    def __init__(self, results: Sequence[Any]):
        timed = [(r.cell.point, r.result) for r in results if r.result.get("seconds") and r.result.get("steps")]
        self.steps: dict[str, list[float]] = {}
        for point, result in timed:
            self.steps.setdefault(point.name, []).append(result["seconds"] / result["steps"])
        speeds = [
            result["tokens"] * point.costs.flops / result["seconds"] for point, result in timed if result.get("tokens")
        ]
        self.speed = statistics.median(speeds) if speeds else None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def how(self) -> str:
        """Name where the seconds come from, in words."""
        if self.speed is not None:
            done = sum(map(len, self.steps.values()))
            return f"from {counted(done, 'training')}, done already; of other points by their median speed, {in_units(self.speed)}FLOP/s"
        speed, step, block = _ASSUMED[self.device]
        return (
            f"assumed, one training at a time on a {'GPU' if self.device == 'cuda' else 'CPU'}: {1e3 * step:g} ms a step, "
            f"{1e3 * block:g} ms for each of its blocks, and {in_units(speed)}FLOP/s; scoring is not in it"
        )

    def seconds(self, point: Point, blocks: int, steps: int, tokens: int) -> float:
        """The seconds that a training of a point takes."""
        flops = tokens * point.costs.flops if point.costs else 0
        if point.name in self.steps:
            return steps * statistics.median(self.steps[point.name])
        if self.speed is not None:
            return flops / self.speed
        speed, step, block = _ASSUMED[self.device]
        return steps * (step + block * blocks) + flops / speed
