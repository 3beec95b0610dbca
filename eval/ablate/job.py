"""A study as its workers are told of it: the points, the phases that its cells come in, and where all is kept."""

import dataclasses
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .cells import Cell, Costs, Point
from .statistics import best_rate, has_score
from .store import Store

__all__ = ["TRAIN_CELL", "Job"]

TRAIN_CELL = "hybridzoo.eval.ablate.measure:train_cell"


@dataclasses.dataclass(frozen=True)
class Job:
    """All that decides about the cells of a study and about how they are run, as plain data can carry it to other processes and hosts.

    Attributes:
        study: The study's name.
        points: Those of its grid that are to be trained.
        measure: What is measured of the cells of the first seed.
        seeds: The first is that of the phase in which rates are compared.
        folder: The study's.
        storage: The URL of a database for the queue; ``None`` for a file in the folder.
        code: The digest that results are kept under.
        device: As :func:`~hybridzoo.train` takes it.
        function: Trains and scores a cell, as ``"module:function"``: takes the cell, its folder, ``device=`` and ``on_step=``, and
            returns its result.
        imports: Files and modules that register foreign mixers.
        until: When to stop, in seconds since 1970.
    """

    study: str
    points: tuple[Point, ...]
    measure: dict[str, Any]
    seeds: tuple[int, ...]
    folder: str
    code: str
    storage: str | None = None
    device: str | None = None
    function: str = TRAIN_CELL
    imports: tuple[str, ...] = ()
    until: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, found: dict[str, Any]) -> "Job":
        """Return the job that :meth:`plain` gave."""
        points = tuple(
            Point(**p | {"rates": tuple(p["rates"]), "costs": p["costs"] and Costs(**p["costs"])})
            for p in found["points"]
        )
        return cls(**found | {"points": points, "seeds": tuple(found["seeds"]), "imports": tuple(found["imports"])})

    def store(self) -> Store:
        """Return the store of its results."""
        return Store(Path(self.folder), self.code)

    def only(self, pattern: str | None) -> "Job":
        """Return it with those points alone whose names a wildcard pattern matches.

        Raises:
            ValueError: There is none; the message lists the names.
        """
        if pattern is None:
            return self
        points = tuple(p for p in self.points if fnmatchcase(p.name, pattern) or p.name == pattern)
        if not points:
            names = ", ".join(repr(p.name) for p in self.points[:8])
            more = f" and {len(self.points) - 8} more" if len(self.points) > 8 else ""
            raise ValueError(
                f"only={pattern!r}: no point has such a name. There are {names}{more}; * and ? are wildcards."
            )
        return dataclasses.replace(self, points=points)

    def cell(self, point: Point, rate: float, seed: int) -> Cell:
        """Return one of its cells."""
        # a model is as fast with any seed
        measure = self.measure if seed == self.seeds[0] else {}
        return Cell(self.study, point, rate, seed, point.task, point.train, measure)

    def first(self, point: Point) -> list[Cell]:
        """Return a point's cells of the first phase: all rates with the first seed; none where it has a problem."""
        return [] if point.problem else [self.cell(point, rate, self.seeds[0]) for rate in point.rates]

    def cells(self, point: Point, store: Store, failed: Collection[str]) -> list[Cell]:
        """Return the cells of a point that are known to be wanted: once its rates are compared, also the other seeds at the best of them.

        Args:
            point: One of its points.
            store: Of its results.
            failed: Keys of cells that are given up.
        """
        first = self.first(point)
        if not all(store.get(cell) or store.key(cell) in failed for cell in first):
            return first
        results = store.results(first)
        # where all rates diverged there is none to repeat
        if not any(map(has_score, results)):
            return first
        rate = best_rate(results)
        return first + [self.cell(point, rate, seed) for seed in self.seeds[1:]]

    def missing(self, store: Store, failed: Collection[str]) -> dict[str, Cell]:
        """Return the cells that are to be trained yet, by key: first what compares rates, then other seeds, points in their order."""
        wanted = [cell for point in self.points for cell in self.cells(point, store, failed)]
        wanted.sort(key=lambda cell: cell.seed != self.seeds[0])
        found = {store.key(cell): cell for cell in wanted if store.get(cell) is None}
        return {key: cell for key, cell in found.items() if key not in failed}

    def every_cell(self) -> Iterable[Cell]:
        """Yield all that can ever be wanted of it: every rate of every point with every seed."""
        for point in self.points:
            if not point.problem:
                yield from (self.cell(point, rate, seed) for seed in self.seeds for rate in point.rates)
