"""Kill a training at a chosen operation on its folder, and see what the same call makes of what is left.

By hand, at every operation, and once more in the run that follows (some minutes): ``python tests/killed.py [--twice]``. Processes are forked, so
that nothing is imported again; they end by ``os._exit``, so that no ``finally`` tidies up after them.
"""

import contextlib
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.train.run import train

SETTINGS = {"steps": 7, "batch_size": 2, "save_every": 3, "lr": 1e-2, "seed": 3, "report_to": "none", "device": "cpu"}
MODEL = zoo.config(
    "transformer-tiny",
    ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"],
)
ROWS = np.random.default_rng(0).integers(1, 200, (9, 12))
MEASURED = {"seconds", "tokens_per_second", "mfu", "memory_GiB"}  # no two runs are equally fast
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Operations:
    """Counts what is about to be done to files below a folder, and ends the process at number ``last``."""

    def __init__(self, folder: Path, last: int):
        self.folder, self.last, self.seen = str(folder), last, []
        sys.addaudithook(self.audit)
        # written by C++ and Rust, of which Python hears nothing; what they were writing is then half there
        torch.save = self.watched(torch.save, 1)
        safetensors.torch.save_file = self.watched(safetensors.torch.save_file, 1)
        import transformers.modeling_utils as modeling

        modeling.safe_save_file = self.watched(modeling.safe_save_file, 1)

    def audit(self, event: str, args: tuple) -> None:
        name = str(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
        relative = event in CHANGES and not os.path.isabs(name)  # below a folder that is being deleted
        if not (name.startswith(self.folder) or relative):
            return
        written = event == "open" and (
            (isinstance(args[1], str) and set(args[1]) & set("wax+")) or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        )
        if event in CHANGES or written:
            self.count(f"{event} {os.path.basename(name)}")

    def count(self, what: str, half: Path | None = None) -> None:
        self.seen.append(what)
        if len(self.seen) == self.last:
            if half is not None:
                os.truncate(half, os.path.getsize(half) // 2)
            os._exit(9)

    def watched(self, function, place: int):
        def run(*args, **kwargs):
            file = Path(args[place] if len(args) > place else kwargs["filename"])
            result = function(*args, **kwargs)
            if str(file).startswith(self.folder):
                self.count(f"half of {file.name}", file)
            return result

        return run


def forked(work) -> int:
    """The exit status of a process that does ``work``."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        gc.freeze()  # what the parent has made is not looked through, which would copy it
        torch.set_num_threads(1)
        work()
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def run(out: Path, report: Path | None = None, last: int = 0, model: Any = MODEL, **options: Any) -> int:
    """One call of ``train`` in a process of its own, killed at operation ``last``; what came of it goes to ``report``."""

    def work():
        operations = Operations(out, last) if last >= 0 else None
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            result = train(model, ROWS, out, **SETTINGS, **options)
        history = [{k: v for k, v in entry.items() if k not in MEASURED} for entry in result.history]
        seconds = [entry["seconds"] for entry in result.history]
        assert seconds == sorted(seconds) and seconds[-1] <= result.seconds, seconds
        facts = {"history": history, "weights": digest_weights(result.model), "saved": digest_weights(zoo.load(out))}
        facts["operations"] = operations.seen if operations else []
        if report is not None:
            report.write_text(json.dumps(facts))

    return forked(work)


def outcome(report: Path) -> dict:
    """What :func:`run` reported, but for the operations."""
    facts = json.loads(report.read_text())
    facts.pop("operations")
    return facts


def leftovers(out: Path) -> list[str]:
    """What does not belong into a finished run's folder; who was at work in it may stay on record."""
    hidden = {".train.lock", ".train.holder"}
    return [str(f.relative_to(out)) for f in out.rglob(".*") if f.name not in hidden]


def main(twice: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        assert run(base / "whole", base / "whole.json") == 0
        operations, expected = json.loads((base / "whole.json").read_text())["operations"], outcome(base / "whole.json")
        print(f"{len(operations)} operations; history of {len(expected['history'])} entries")
        wrong = 0
        for n in range(1, len(operations) + 1):
            out, report = base / f"cut{n}", base / f"cut{n}.json"
            status = [run(out, last=n)]
            if twice:
                status.append(run(out, report, last=1 + (7 * n) % 40))
            if not report.exists():
                status.append(run(out, report, last=0))
            same = report.exists() and outcome(report) == expected
            left = leftovers(out)
            if not same or left or status[0] != 9:
                wrong += 1
                print(f"{n}: {operations[n - 1]}: {status} {'same' if same else 'ANOTHER OUTCOME'} {left}")
        print(f"{wrong} of {len(operations)} went wrong")


if __name__ == "__main__":
    main("--twice" in sys.argv)
