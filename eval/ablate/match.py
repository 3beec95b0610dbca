"""Models of equal cost: the integer size at which a model costs what another does, found by building models, and by no formula of costs."""

import itertools
from collections.abc import Callable

__all__ = ["Unmatched", "nearest_size"]

_LARGEST = 2**20
# sizes that cannot be built are stepped over up to this far, which a size that must divide by 128 needs
_REACH = 128
_STEPS = 64
_DOUBLINGS = 9


class Unmatched(ValueError):
    """No size gives the cost; the message has the nearest ones."""


def nearest_size(cost: Callable[[int], float | None], start: int, target: float, within: float) -> int:
    """Find the size whose cost is nearest to a target.

    Whether cost rises or falls with size is found out. It should do one of the two, and need not do it evenly: a guess is where a line
    through two known sizes meets the target, and known sizes on both sides of it close in on it.

    Args:
        cost: Of a size, at least 1; ``None`` where nothing of that size can be built.
        start: The size to begin with.
        target: Above 0.
        within: The share of the target that may be missed.

    Raises:
        Unmatched: No size is near enough, the size does not matter, or none near ``start`` can be built.
    """
    search = _Search(cost, target, within * target)
    if search.near(start, 1, _LARGEST) is None:
        raise Unmatched(f"cannot be built at {start:,} nor at sizes within {_REACH} of it")
    if search.misses():
        search.second()
        for _ in range(_STEPS):
            if search.is_nearest() or not search.step():
                break
    best = search.best()
    if search.misses() > search.allowed:
        raise Unmatched(search.nearest_two())
    return best


class _Search:
    """The sizes that have been built, and what they cost."""

    def __init__(self, cost: Callable[[int], float | None], target: float, allowed: float):
        self.cost, self.target, self.allowed = cost, target, allowed
        self.asked: dict[int, float | None] = {}
        self.slow = False

    @property
    def known(self) -> dict[int, float]:
        return {size: cost for size, cost in sorted(self.asked.items()) if cost is not None}

    def near(self, size: int, low: int, high: int) -> int | None:
        """Build the size nearest to one between bounds that can be built and has not been."""
        for away in range(_REACH + 1):
            for other in dict.fromkeys((size - away, size + away)):
                if low <= other <= high and other not in self.asked:
                    self.asked[other] = self.cost(other)
                    if self.asked[other] is not None:
                        return other
        return None

    def best(self) -> int:
        return min(self.known, key=lambda size: abs(self.known[size] - self.target))

    def misses(self) -> float:
        return abs(self.known[self.best()] - self.target)

    def second(self) -> None:
        """Build a size that costs something else than the first."""
        ((start, first),) = self.known.items()
        # most costs grow with a size, and none faster than its square by much
        guess = round(start * min(4.0, max(0.25, self.target / first)))
        for size in (guess, *(start * 2**k for k in range(1, _DOUBLINGS)), start // 2):
            if self.near(max(1, size), 1, _LARGEST) is not None and len(set(self.known.values())) > 1:
                return
        sizes = ", ".join(f"{size:,}" for size in self.known)
        raise Unmatched(f"it is {first:,.0f} at every size ({sizes}): the size decides nothing there")

    def sides(self) -> tuple[int, int] | None:
        """The neighbours among known sizes that have the target between them."""
        sizes = list(self.known)
        for low, high in itertools.pairwise(sizes):
            if (self.known[low] < self.target) != (self.known[high] < self.target):
                return low, high
        return None

    def is_nearest(self) -> bool:
        """Tell whether the best size cannot be improved on, as far as the slope beside it says."""
        a, b = self.sides() or (self.best(), self.beside())
        slope = abs((self.known[b] - self.known[a]) / (b - a))
        closed = self.sides() is not None and b - a == 1
        return closed or self.misses() <= min(slope / 2, self.allowed)

    def beside(self) -> int:
        """The size nearest to the best one that costs something else."""
        known, best = self.known, self.best()
        return min((size for size in known if known[size] != known[best]), key=lambda size: abs(size - best))

    def step(self) -> bool:
        """Build one more size; ``False`` if there is none to try."""
        known = self.known
        if sides := self.sides():
            low, high = sides
            guess = self._line(low, high)
            guess = (low + high) // 2 if self.slow else min(high - 1, max(low + 1, guess))
            found = self.near(guess, low + 1, high - 1)
            new = self.sides()
            # a line that always falls on one side crawls: then the middle is next
            self.slow = not self.slow and new is not None and new[1] - new[0] > (high - low) / 2
            return found is not None
        best, low, high = self.best(), min(known), max(known)
        other = self.beside()
        guess = self._line(best, other)
        # all known sizes are on one side, so the next lies beyond them
        if ((known[other] - known[best]) * (other - best) > 0) == (self.target > known[best]):
            return high < _LARGEST and self.near(min(max(guess, high + 1), 4 * high), high + 1, _LARGEST) is not None
        return low > 1 and self.near(max(min(guess, low - 1), low // 4, 1), 1, low - 1) is not None

    def _line(self, a: int, b: int) -> int:
        return round(a + (b - a) * (self.target - self.known[a]) / (self.known[b] - self.known[a]))

    def nearest_two(self) -> str:
        """The nearest sizes on both sides of the target, in words."""
        sides = self.sides() or (self.best(),)
        words = [f"{self.known[s]:,.0f} at {s:,} ({self.known[s] / self.target - 1:+.1%})" for s in sides]
        return " and ".join(words) + f", and {self.target:,.0f} is wanted"
