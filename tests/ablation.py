"""Small cells, points and results for tests of studies, and cheap stand-ins for the training of a cell."""

from hybridzoo.eval.ablate.cells import Cell, Point

__all__ = ["a_cell", "a_point", "result_of"]


def a_point(name="attention=0.5", rates=(1e-3,), **more):
    return Point(name, {"attention": 0.5}, {"d_model": 16, "called": name}, tuple(rates), **more)


def a_cell(rate=1e-3, seed=0, point=None):
    return Cell("study", point or a_point(), rate, seed, {"name": "mqar", "length": 64}, {"steps": 10}, {})


def result_of(valid, test=None, metric="accuracy", **more):
    scores = {"valid": {metric: valid, "n": 8}, "test": {metric: valid if test is None else test, "n": 8}}
    return {"metric": metric, **scores, "seconds": 0.1, "steps": 10, **more}
