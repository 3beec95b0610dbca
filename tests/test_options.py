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

    epsilon: float = option(0.95, "Decay of the second moments.", bound=at_least(0), trainer="adam_epsilon")
    log_every: int | None = option(None, "Steps between two lines.", unset="a minute", bound=at_least(1), setting=False)
    fast: bool = option(False, "Make haste.", setting=False)
    model: str = dataclasses.field(kw_only=False, metadata={"help": "Which one."})


@called_with(More)
def run(call: More) -> tuple:
    """Run.

    Raises:
        ValueError: Never.
    """
    return call.model, call.epsilon, call.steps, call.log_every


def test_a_field_is_in_the_signature_and_its_documentation():
    parameters = inspect.signature(run).parameters
    assert list(parameters)[:2] == ["model", "steps"] and set(parameters) == {f.name for f in dataclasses.fields(More)}
    assert parameters["epsilon"].default == 0.95 and parameters["log_every"].annotation == int | None
    assert parameters["model"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert inspect.signature(run).return_annotation is tuple
    for line in (
        "    model: Which one.",
        "    epsilon: Decay of the second moments.",
        "    log_every: Steps between two lines. By default a minute.",
    ):
        assert f"{line}\n" in run.__doc__
    assert run.__doc__.index("Run.") < run.__doc__.index("Args:") < run.__doc__.index("Raises:")


def test_a_field_is_an_argument():
    assert run("a", steps=3, epsilon=0.5) == run(model="a", steps=3, epsilon=0.5) == ("a", 0.5, 3, None)
    for wrong, message in (
        ({"epsilon": -1}, r"train\(epsilon=-1\): must be a number at least 0, and finite"),
        ({"log_every": 0}, r"train\(log_every=0\): must be at least 1\. Leave it out for the default\."),
    ):
        with pytest.raises(ValueError, match=message):
            run("a", **wrong)
    with pytest.raises(TypeError, match=r"^run\(\) got an unexpected keyword argument 'epsilon3'"):
        run("a", epsilon3=1)
    with pytest.raises(TypeError, match=r"^run\(\) missing a required argument: 'model'"):
        run()


def test_a_field_is_a_setting_and_an_argument_of_the_trainer():
    options = More(model="a", epsilon=1, log_every=2)
    assert options.settings() == TrainOptions().settings() | {"epsilon": 1.0}
    assert options.for_trainer() == TrainOptions().for_trainer() | {"adam_epsilon": 1.0}


def test_a_field_is_an_option_of_the_command_line():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Fewer:
        epsilon: float = option(0.95, "Decay of the second moments.")
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
    assert "--no-fast" not in text and text.index("--epsilon") < text.index("--fast") < text.index("--last")
    done = CliRunner().invoke(app, ["m", "--epsilon", "0.5", "--fast"], catch_exceptions=False)
    assert done.exit_code == 0 and got == {"epsilon": 0.5, "log_every": None, "fast": True, "model": "m", "last": 0}


def test_every_option_of_a_training_is_one_of_the_command():
    from hybridzoo.__main__ import app

    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(f"--{f.name.replace('_', '-')} " in text for f in dataclasses.fields(TrainOptions))
    assert all(f.metadata["panel"] for f in dataclasses.fields(TrainOptions))
    panels = [line.split("─")[1].strip() for line in text.splitlines() if line.startswith("╭")]
    assert {"Data", "Optimiser", "Evaluation", "Speed", "Run", "Images", "Fine-tuning"} <= set(panels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "muon", "layer_decay": 0.7}, r"train\(optimizer='muon', layer_decay=0.7\): Muon has one rate"),
        ({"ema": 0.99, "lora": 4}, r"train\(ema=0.99, lora=4\): do not go together. Leave one out"),
        ({"layer_decay": 0}, r"train\(layer_decay=0\): must be a number above 0, up to 1"),
        ({"mixup": -1}, r"train\(mixup=-1\): must be a number at least 0"),
        ({"augment": "shifts"}, r"augment='shifts': is not known. Did you mean 'shift'\?"),
        ({"schedule": "constant", "final_lr": 0.1}, r"train\(final_lr=0.1\): a constant rate does not fall"),
        ({"schedule": "wsd", "warmup": 900, "decay": 0.2}, r"train\(warmup=900, decay=0.2\): together more than all of the 1000"),
        ({"schedule": "wds"}, r"schedule='wds': is not known. Did you mean 'wsd'\?"),
        ({"precision": "float16"}, r"precision='float16': is not known"),
        ({"capture": "yes"}, r"capture='yes': is not known"),
        ({"optimizer": "muno"}, r"Did you mean 'muon'\?"),
        ({"accumulate": 0}, r"train\(accumulate=0\): must be at least 1"),
        ({"beta1": 1}, r"train\(beta1=1\): must be a number at least 0, and below 1, and finite"),
        ({"final_lr": 1.5}, r"train\(final_lr=1.5\): must be a number from 0 to 1"),
        ({"clip": -1}, r"train\(clip=-1\): must be a number at least 0"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)
