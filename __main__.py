"""The command line, composed of the zoo's commands and those of evaluation: the script ``zoo``, and ``python -m hybridzoo``."""

import sys
import warnings
from pathlib import Path

from .eval import commands as evaluation
from .zoo import commands, image_commands, text_commands
from .zoo.terminal import program, say

__all__ = ["app", "main"]

app = program(commands.app, text_commands.app, image_commands.app, evaluation.app)


def main() -> None:
    """Run the command in ``sys.argv``."""
    # a warning is for who typed the command, and not about the line of ours that gives it
    warnings.showwarning = lambda message, *rest, **more: say(f"warning: {message}")
    app()


if __name__ == "__main__":
    # started in the package's own folder, Python would find its `kernels` where others mean a package of that name
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    main()
