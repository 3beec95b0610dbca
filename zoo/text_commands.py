"""The command that continues texts. Each part is a few lines around what anybody can call; heavy imports wait inside."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import option
from .sampling_options import TEMPERATURES, SamplingOptions
from .terminal import Device, Dtype, ModelName, print_json, print_text, say, torch_dtype, with_options

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampling(SamplingOptions):
    temperature: Any = option(  # noqa: RUF009  # a field, as the others
        None, "Logits are divided by it; 0 is greedy.", unset="0.8, or 0 with --assistant", typed=float | None, bound=TEMPERATURES,
        panel="Sampling",
    )  # fmt: skip


@app.command(epilog="Example: [bold]zoo generate runs/demo/mamba-tiny --prompt 'The ' --temperature 0.8[/bold]")
@with_options(_Sampling)
def generate(
    model: ModelName,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue.", show_default="standard input, if something is piped there")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts: one in each line, or in .jsonl under 'prompt'; - for standard input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 200,
    n: Annotated[int, typer.Option("--n", help="Samples of every prompt.", min=1)] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a sample; may be given more than once.")
    ] = None,
    assistant: Annotated[
        str | None,
        typer.Option(help="A smaller model that guesses, or lookup: greedy text is the same, and sooner there."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that are continued at once.", min=1)] = 16,
    device: Device = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights; a GPU has kernels for steps in 16 bits.", show_default="as they are stored"),
    ] = None,
    state_dtype: Annotated[
        Dtype | None,
        typer.Option(help="In which recurrent states are kept from step to step.", show_default="float32"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: an object, or for --prompts one in each line, as they come.")
    ] = False,
    **given: Any,
) -> None:
    """Continue texts; a single one is printed as it comes."""
    from .named import check_model, check_there

    usual = 0.0 if assistant else 0.8
    given["temperature"] = usual if given["temperature"] is None else given["temperature"]
    options = _Sampling(**given).values() | {"max_new_tokens": max_new_tokens, "n": n, "stop": stop or None}
    options["state_dtype"] = torch_dtype(state_dtype)
    how = {"device": device, "dtype": torch_dtype(dtype), "seed": options["seed"]}
    if prompt is not None and prompts is not None:
        raise ValueError("generate(--prompt, --prompts): give one of them.")
    check_model(model)
    if prompts is not None and str(prompts) != "-":
        check_there(prompts, "Give a file of prompts, one in each line, or - for standard input.")
    asked = None if prompts is None else _read(prompts)
    text = _piped() if prompt is None and asked is None else prompt or ""
    if assistant:
        options["assistant"] = _assistant(assistant, how)
    writer = _Writer(_opened(model, **how), model, options)
    if asked is None and n == 1 and not as_json:
        writer.stream(text)
    elif asked is None:
        print_json(writer.batch([text])) if as_json and n > 1 else _show(writer.batch([text]), as_json)
    else:
        for start in range(0, len(asked), batch_size):
            for found in writer.batch(asked[start : start + batch_size]):
                print_text(json.dumps(found, ensure_ascii=False) if as_json else f"{found['prompt']}{found['text']}\n")


def _piped() -> str:
    return "" if sys.stdin is None or sys.stdin.isatty() else _text_of(None)


def _show(found: list[dict[str, Any]], as_json: bool) -> None:
    for one in found:
        print_json(one) if as_json else print_text(f"{one['prompt']}{one['text']}" + ("\n" if len(found) > 1 else ""))


def _read(path: Path) -> list[str]:
    """The prompts of a file, with the number of a line that cannot be read."""
    where = "standard input" if str(path) == "-" else str(path)
    asked = []
    # by newlines alone: str.splitlines would also cut at U+0085, U+2028 and others that may stand inside a prompt
    for number, line in enumerate(_text_of(None if str(path) == "-" else path).split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
            except (json.JSONDecodeError, KeyError, TypeError) as e:
                raise ValueError(f"{where}, line {number}: no object with a 'prompt' ({type(e).__name__}: {e}).") from e
            if not isinstance(line, str):
                raise ValueError(f"{where}, line {number}: the prompt is a {type(line).__name__}, expected a text.")
            if half := re.search("[\ud800-\udfff]", line):
                raise ValueError(
                    f"{where}, line {number}: the prompt holds {half[0]!a}, half of a surrogate pair, which is no character. Leave it out."
                )
        asked.append(line)
    if not asked:
        raise ValueError(f"{where}: holds no prompts. Write one in each line.")
    return asked


def _text_of(path: Path | None) -> str:
    """The text of a file, or of standard input, as training reads it: UTF-8 without a byte-order mark, every end of a line a newline."""
    from .corpus.text_files import decoded

    if path is None and sys.stdin is None:
        raise ValueError("standard input: is closed. Pipe prompts into it, or name a file of them (--prompts).")
    raw = sys.stdin.buffer.read() if path is None else path.read_bytes()
    text = decoded(raw, "standard input" if path is None else str(path), 0, instead="")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _assistant(name: str, how: dict[str, Any]) -> Any:
    from .named import check_model

    if name == "lookup":
        return name
    check_model(name)
    return _opened(name, **how)


def _opened(model: str, device: Any, dtype: Any, seed: int) -> Any:
    import torch

    from .checkpoint import load
    from .checkpoint.single import file_in
    from .device import pick_device
    from .models.build import build
    from .models.finite import check_finite
    from .models.tasks import check_language_model
    from .train.options import holds_weights

    at = pick_device(device)
    torch.manual_seed(seed % 2**63)  # draws take any, torch no larger ones
    if Path(model).is_dir() or holds_weights(model) or file_in(Path(model)):
        built = load(model, device=at, dtype=dtype)
        check_language_model(built, model)
        check_finite(built, model)
        return built
    built = build(model, device=at, dtype=dtype).eval()
    check_language_model(built, model)
    say(f"{model} is a config: the model is untrained, and babbles")
    return built


class _Writer:
    """Continues texts with a model, and makes texts of the tokens."""

    def __init__(self, model: Any, name: str, options: dict[str, Any]):
        from .tokenizer import ends_of_text

        self.model, self.name, self.ends = model, name, ends_of_text(model)
        self.options = options | {"eos_token_id": self.ends}
        self.device = model.some_weight().device

    def _encoded(self, prompts: list[str]) -> Any:
        import torch

        from .tokenizer import encode_prompt

        rows = [encode_prompt(self.model, text) for text in prompts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, -len(row) :], mask[i, -len(row) :] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device) if len(rows) > 1 else None

    def _text(self, tokens: list[int], before: int) -> str:
        """The text of new tokens, as it stands behind a prompt with the last token ``before``."""
        from .tokenizer import space_between

        told = tokens[: -1 if tokens[-1:] and tokens[-1] in self.ends else None]
        space = space_between(self.model.tokenizer, before, told[0]) if told else ""
        return space + self.model.tokenizer.decode(told)

    def stream(self, prompt: str) -> None:
        """Print a prompt and its continuation, piece by piece; half a letter waits for its other half."""
        ids, _ = self._encoded([prompt])
        looks = self.model.stream(
            ids, **self.options
        )  # what is wrong with the options is said before anything is printed
        print_text(prompt, end="")
        tokens: list[int] = []
        shown = ""
        for look in looks:
            tokens += look.tokens[0, : int(look.counts[0]) - len(tokens)].tolist()
            text = self._text(tokens, int(ids[0, -1]))
            whole = text.rstrip("\ufffd") if not look.finished[0] else text
            print_text(whole[len(shown) :], end="")
            shown = whole
        print_text("")

    def batch(self, prompts: list[str]) -> list[dict[str, Any]]:
        """Continue prompts side by side: an object for each sample of each."""
        ids, mask = self._encoded(prompts)
        made = self.model.generate(ids, attention_mask=mask, details=True, **self.options)
        found, last = [], ids[:, -1].tolist()
        for i, count in enumerate(made.counts.tolist()):
            new = made.sequences[i, ids.shape[1] : ids.shape[1] + count].tolist()
            about = {"text": self._text(new, last[i // self.options["n"]]), "tokens": count, "ended": made.reasons[i]}
            logprobs = [round(x, 5) for x in made.logprobs[i, :count].tolist()]
            found.append({"model": self.name, "prompt": prompts[i // self.options["n"]], **about, "logprobs": logprobs})
        return found
