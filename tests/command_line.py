"""The command line, called in this process, for tests of several files."""

from typer.testing import CliRunner

from hybridzoo.__main__ import app

__all__ = ["invoke"]


def invoke(*arguments, status=0, **more):
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "200", "HYBRIDZOO_DEBUG": None}, **more
    )
    assert result.exit_code == status, (result.output, result.stderr, result.exception)
    return result
