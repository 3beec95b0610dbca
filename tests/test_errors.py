"""Errors about files: one bounded line that no terminal acts upon."""

import pickle

import pytest
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.zoo.checkpoint import CheckpointError
from hybridzoo.zoo.errors import printable
from hybridzoo.zoo.terminal import say

# colour, title of the window, line breaks of three kinds, right-to-left override, isolate, bell, C1 control, lone surrogate
ACTING = ["\x1b[31m", "\x1b]0;x\x07", "\n", "\r", "\u2028", "\u202e", "\u2066", "\x07", "\x9b31m", "\udcff", "\x00"]


@pytest.mark.parametrize("kind", [zoo.ConfigError, CheckpointError])
@pytest.mark.parametrize("text", ACTING, ids=repr)
def test_what_a_terminal_acts_upon_is_shown_as_an_escape(kind, text):
    shown = str(kind(f"x{text}y: 漢字 and é stay"))
    assert shown.isprintable() and shown.startswith("x\\") and shown.endswith("y: 漢字 and é stay")
    assert str(pickle.loads(pickle.dumps(kind(f"x{text}y")))) == str(kind(f"x{text}y"))


def test_a_long_error_keeps_its_ends():
    shown = str(zoo.ConfigError("d_model: found " + "9" * 1_000_000 + ". Choose a smaller one."))
    assert len(shown) < 1300 and shown.startswith("d_model: found 999") and shown.endswith("9. Choose a smaller one.")
    assert "characters left out" in shown


def test_lines_of_our_own_stay_lines():
    assert printable("one\ntwo\x1b[1m", keep="\n") == "one\ntwo\\x1b[1m"


def test_a_file_does_not_reach_the_terminal_raw(tmp_path, capsys):
    file = tmp_path / "x.yaml"
    for text in (
        'base: mamba-tiny\n"\\e[31mkey": 1\n',
        'base: mamba-tiny\ntask: "\\e[31m"\n',
        'base: "\\e]0;x\\a"\n',
        'base: mamba-tiny\nlayers: "mamba \\e"\n',
        'base: mamba-tiny\nmixers: {"\\u202ea": {}}\n',
        'base: mamba-tiny\nmixers: {mamba: {d_state: "\\e[31m"}}\n',
        'base: mamba-tiny\nd_model: "\\e[31m"\n',
        '"\\e[31m": 1\n"\\e[31m": 2\n',
    ):
        file.write_text(text)
        with pytest.raises(zoo.ConfigError) as e:
            zoo.config(file)
        assert str(e.value).isprintable() and ("\\x1b" in str(e.value) or "\\u202e" in str(e.value))
        # nor by what Python prints of the errors behind it
        assert e.value.__cause__ is None
        result = CliRunner().invoke(app, ["show", str(file)])
        assert result.exit_code == 1 and not {"\x1b", "\u202e", "\x07"} & set(result.stderr)
    say("a name from a file: \x1b[31m")
    assert "\x1b" not in capsys.readouterr().err
