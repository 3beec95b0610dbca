"""Ablations: a study is one YAML, a grid of models of equal cost, trained and compared over learning rates and seeds.

:class:`~hybridzoo.eval.ablate.study.Study` is what others use. Inside, a study's file (:mod:`.schema`) becomes :mod:`.points`, matched
in cost (:mod:`.match`); of these come :mod:`.cells`, each trained and measured by :mod:`.measure` on a task of :mod:`.tasks`; workers
share them through :mod:`.queue` and keep what came out in :mod:`.store`; :mod:`.statistics` and :mod:`.report` say what it means.
"""

from typing import TYPE_CHECKING

from ...zoo.lazily import lazily

if TYPE_CHECKING:
    from .study import Study as Study

__all__ = ["Study"]

__getattr__, __dir__ = lazily(__name__, extras={"Study": "ablate"}, Study="study")
