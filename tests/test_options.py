"""Options are spelled once: a field of a dataclass is in the signature, its documentation, the command line and the settings."""

import dataclasses
import inspect

import pytest
import typer
from typer.testing import CliRunner

from hybridzoo.zoo.options import at_least, called_with, option
from hybridzoo.zoo.terminal import with_options
from hybridzoo.zoo.train.options import TrainOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class More(TrainOptions):
    """Two options more, and an argument."""

    beta2: float = option(0.95, "Decay of the second moments.", bound=at_least(0), trainer="adam_beta2")
    log_every: int | None = option(None, "Steps between two lines.", unset="a minute", bound=at_least(1), setting=False)
    fast: bool = option(False, "Make haste.", setting=False)
    model: str = dataclasses.field(kw_only=False, metadata={"help": "Which one."})


@called_with(More)
def run(call: More) -> tuple:
    """Run.

    Raises:
        ValueError: Never.
    """
    return call.model, call.beta2, call.steps, call.log_every


def test_a_field_is_in_the_signature_and_its_documentation():
    parameters = inspect.signature(run).parameters
    assert list(parameters)[:2] == ["model", "steps"] and set(parameters) == {f.name for f in dataclasses.fields(More)}
    assert parameters["beta2"].default == 0.95 and parameters["log_every"].annotation == int | None
    assert parameters["model"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert inspect.signature(run).return_annotation is tuple
    for line in (
        "    model: Which one.",
        "    beta2: Decay of the second moments.",
        "    log_every: Steps between two lines. By default a minute.",
    ):
        assert f"{line}\n" in run.__doc__
    assert run.__doc__.index("Run.") < run.__doc__.index("Args:") < run.__doc__.index("Raises:")


def test_a_field_is_an_argument():
    assert run("a", steps=3, beta2=0.5) == run(model="a", steps=3, beta2=0.5) == ("a", 0.5, 3, None)
    for wrong, message in (
        ({"beta2": -1}, r"train\(beta2=-1\): must be a number at least 0, and finite"),
        ({"log_every": 0}, r"train\(log_every=0\): must be at least 1\. Leave it out for the default\."),
    ):
        with pytest.raises(ValueError, match=message):
            run("a", **wrong)
    with pytest.raises(TypeError, match=r"^run\(\) got an unexpected keyword argument 'beta3'"):
        run("a", beta3=1)
    with pytest.raises(TypeError, match=r"^run\(\) missing a required argument: 'model'"):
        run()


def test_a_field_is_a_setting_and_an_argument_of_the_trainer():
    options = More(model="a", beta2=1, log_every=2)
    assert options.settings() == TrainOptions().settings() | {"beta2": 1.0}
    assert options.for_trainer() == TrainOptions().for_trainer() | {"adam_beta2": 1.0}


def test_a_field_is_an_option_of_the_command_line():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Fewer:
        beta2: float = option(0.95, "Decay of the second moments.")
        log_every: int | None = option(None, "Steps between two lines.", unset="a minute")
        fast: bool = option(False, "Make haste.")

    app = typer.Typer()
    got = {}

    @app.command()
    @with_options(Fewer)
    def command(model: str, *, last: int = 0, **options) -> None:
        got.update(options, model=model, last=last)

    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    assert "Decay of the second moments. [default: 0.95]" in text and "[default: (a minute)]" in text
    assert "--no-fast" not in text and text.index("--beta2") < text.index("--fast") < text.index("--last")
    done = CliRunner().invoke(app, ["m", "--beta2", "0.5", "--fast"], catch_exceptions=False)
    assert done.exit_code == 0 and got == {"beta2": 0.5, "log_every": None, "fast": True, "model": "m", "last": 0}


def test_every_option_of_a_training_is_one_of_the_command():
    from hybridzoo.__main__ import app

    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(f"--{f.name.replace('_', '-')} " in text for f in dataclasses.fields(TrainOptions))
