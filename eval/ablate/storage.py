"""Opening the storage of a queue, and one kind of error for all that can be wrong with it."""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .journal import Journal, QueueError

__all__ = ["guarded", "open_storage"]

# by the first part of a URL: drivers as SQLAlchemy and as pip know them, first those that it takes when none is named
_DRIVERS = {
    "postgresql": {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"},
    "mysql": {"mysqldb": "mysqlclient", "pymysql": "pymysql"},
}
_MODULES = {"mysqldb": "MySQLdb"}
_TRIES = 5


def open_storage(journal: Path, url: str | None = None) -> Any:
    """Return Optuna's storage: the database at a URL, or else a journal file.

    Raises:
        QueueError: It cannot be read, written or reached, or its driver is not installed.
    """
    from optuna.storages import JournalStorage, RDBStorage, get_storage

    if url is None:
        return JournalStorage(Journal(journal))
    if "://" not in url:
        raise QueueError(
            f"--storage {url}: is no URL of a database. Say postgresql://USER@HOST/NAME, mysql:// or sqlite:///FILE, or leave it out."
        )
    kind, driver = _driver_of(url)
    used = url if driver is None else f"{kind}+{driver}://{url.partition('://')[2]}"
    for left in reversed(range(_TRIES)):
        try:
            # a connection that the server has closed meanwhile is made anew
            return get_storage(RDBStorage(used, engine_kwargs={"pool_pre_ping": True}))
        except ImportError as e:
            package = next(iter(_DRIVERS.get(kind, {}).values()), "the one that SQLAlchemy names for it")
            raise QueueError(f"--storage {shown(url)}: needs a driver. Install it: pip install '{package}'.") from e
        except Exception as e:
            # tables that two processes create at once are there for the next try
            if not left or not _are_created(e):
                raise unreachable(url, e) from e
            time.sleep(0.2)
    raise AssertionError("the last try returns or raises")


def _driver_of(url: str) -> tuple[str, str | None]:
    """Return the kind of a database, and the driver to use where the URL leaves it open."""
    kind = url.partition("://")[0]
    installed = (name for name in _DRIVERS.get(kind, ()) if importlib.util.find_spec(_MODULES.get(name, name)))
    return kind, next(installed, None)


def guarded(url: str | None) -> Callable[[], AbstractContextManager[None]]:
    """Return a context that turns the errors of a database into :class:`~hybridzoo.eval.ablate.journal.QueueError`."""

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as e:
            raise unreachable(url or "", e) from e

    return guard


def unreachable(url: str, e: Exception) -> QueueError:
    """Return the error of a database that does not answer as it should."""
    cause = e.__cause__ or e
    reason = str(getattr(cause, "orig", cause)).strip().splitlines() or [type(cause).__name__]
    return QueueError(
        f"--storage {shown(url)}: cannot be used ({reason[0]}). See whether the server runs, the database exists and the user may write; "
        "what was finished is kept, and the same command goes on."
    )


def shown(url: str) -> str:
    """Return a URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return url.partition("://")[0] + "://..."


def _are_created(e: Exception) -> bool:
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    said = str(e).lower()
    created = "already exists" in said or "database is locked" in said
    return isinstance(e, IntegrityError) or (created and isinstance(e, OperationalError | ProgrammingError))
