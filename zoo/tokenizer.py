"""The tokenizers that are built in, and those of others.

``byte``: a token is a byte, and id 0 ends a document. Byte 0 does not occur in text, so its id is free for ``<|endoftext|>``. ``ascii``: a
token is a byte too, but all that are not printable ASCII, tab or line end are one. The same tables are written as a ``tokenizer.json``, so
that transformers, lm-eval and a saved folder agree with them id by id.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import SourceError
from .hub import unreachable

__all__ = [
    "BUILT_IN",
    "AsciiTokenizer",
    "ByteTokenizer",
    "appends_end",
    "byte_tokenizer",
    "check_growth",
    "document_encoder",
    "encode_prompt",
    "ends_of_text",
    "from_transformers",
    "load_tokenizer",
    "space_between",
    "tokenizer_files",
    "tokenizer_folder",
    "whose",
]

_END, _PAD = "<|endoftext|>", "<|pad|>"
_SPECIAL = ("bos_token", "eos_token", "pad_token")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_REMEDY = "Name a folder that holds a tokenizer.json, a hub id, byte or ascii"
# what a folder with a tokenizer in it has one of
_OWN = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*.model", "tekken.json")
# published ones reach 9: a space becomes a character of three bytes, perhaps twice
_MOST_TIMES = 1000
# of what one character becomes in a compiled map; those of Unicode's compatibility forms have 33 bytes
_LONGEST_CHARACTER = 1000
_STEPS = ("normalizers", "pretokenizers", "processors", "decoders")


class ByteTokenizer:
    """Text to bytes and back; needs no files and no library."""

    vocab_size = 256
    eos_token_id = 0

    def in_bytes(self, text: str) -> bytes:
        """The ids as bytes: those of the UTF-8; NUL characters are left out, since their id ends a document."""
        return text.encode("utf-8", errors="replace").replace(b"\0", b"")

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self.in_bytes(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a run of ids; ends of documents are left out and broken UTF-8 is replaced."""
        return bytes(i for i in ids if 0 < i < 256).decode("utf-8", errors="replace")


class AsciiTokenizer:
    """Text to the bytes that typeseg knows (PyPI, 0.2.7, ``_tokenize.py``); needs no files and no library.

    Ids below 128 are those of printable ASCII, tab, line feed and carriage return; every other byte of the UTF-8 is 128, and 129 pads.
    """

    vocab_size = 130
    eos_token_id = None
    pad_token_id = 129
    _other = 128
    _known = frozenset(b"\t\n\r" + bytes(range(0x20, 0x7F)))

    def in_bytes(self, text: str) -> bytes:
        """The ids as bytes, one for each of the UTF-8; half characters (lone surrogates) are left out."""
        return text.encode("utf-8", errors="ignore").translate(_ASCII)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self.in_bytes(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a run of ids; what was no ASCII is replaced, and padding left out."""
        return "".join(chr(i) if i in self._known else "\ufffd" for i in ids if 0 <= i <= self._other)


_ASCII = bytes(b if b in AsciiTokenizer._known else AsciiTokenizer._other for b in range(256))
BUILT_IN: dict[str, type[ByteTokenizer] | type[AsciiTokenizer]] = {"byte": ByteTokenizer, "ascii": AsciiTokenizer}


def load_tokenizer(name: str, source: Path | None = None) -> Any:
    """The tokenizer, with ``encode``, ``decode`` and ``eos_token_id``, of a model from the folder ``source`` whose config says ``name``.

    Raises:
        ValueError: There is no such tokenizer, it cannot be read, or it needs code of its own, which is never run.
    """
    found = whose(name, source)
    return BUILT_IN[found]() if found in BUILT_IN else from_transformers(found)


def whose(name: str, source: Path | None) -> str:
    """Find a model's tokenizer: ``byte`` or ``ascii`` for one that is built in, else a folder or a hub id.

    Files of a tokenizer in the model's folder go before the config, which may name a place on another machine. What the config names by a
    relative path is looked for in the model's folder; one that leads out of it is a ``ValueError``.
    """
    if source is None:
        return name
    if any(f.is_file() for pattern in _OWN for f in source.glob(pattern)):
        return name if name in BUILT_IN and _is_built_in(name, source) else str(source)
    if name in BUILT_IN or Path(name).is_absolute():
        return name
    inside = source / name
    if ".." in Path(name).parts or (inside.exists() and not inside.resolve().is_relative_to(source.resolve())):
        raise SourceError(
            f"tokenizer: {name!r} leads out of {source}, whose config names it. Put the tokenizer's files into the folder, or write an "
            "absolute path or a hub id into its config."
        )
    return str(inside) if inside.is_dir() else name


def tokenizer_folder(name: str, source: Path | None) -> Path | None:
    """The folder with the files of a model's tokenizer, for who takes them along; ``None`` where they are ours, the hub's or nowhere."""
    try:
        found = whose(name, source)
    except SourceError:
        return None  # said when the tokenizer is asked for
    return Path(found) if found not in BUILT_IN and Path(found).is_dir() else None


def from_transformers(name: str) -> Any:
    """As :func:`load_tokenizer`, in a folder or of a hub id, as transformers has it; nobody is asked whether code of its own may run."""
    from transformers import AutoTokenizer, PreTrainedConfig

    folder = Path(name) if Path(name).is_dir() else None
    if folder is None and (Path(name).exists() or not _HUB_ID.fullmatch(name)):
        raise SourceError(f"tokenizer {name!r}: no such folder, and no hub id. {_REMEDY}.")
    why = unreachable() if folder is None else None
    more: dict[str, Any] = {"trust_remote_code": False, "local_files_only": folder is not None or why is not None}
    config = _content(folder / "config.json") if folder is not None else None
    if isinstance(config, dict) and config.get("model_type") == "hybridzoo":
        # of our models it knows nothing to choose by, and the adapter that it would load takes a second
        more["config"] = PreTrainedConfig()
    try:
        if folder is not None and isinstance(content := _content(folder / "tokenizer.json"), dict):
            check_growth(content)
        return AutoTokenizer.from_pretrained(name, **more)
    # what is missing or damaged ends in whatever the part that meets it raises, PanicException of Rust included, which is no Exception
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        if "trust_remote_code" in str(e):
            reason = "needs code of its own, which is never run. Save it as a tokenizer.json, and name that folder"
        elif why is not None:
            reason = f"no such folder, not downloaded before, and {why}. Check the name and the connection"
        else:
            said = (str(e).strip() or "no reason").splitlines()[0]
            reason = f"cannot be read ({type(e).__name__}: {said}). {_REMEDY}"
        raise SourceError(f"tokenizer {name!r}: {reason}.") from e


def encode_prompt(model: Any, text: str) -> list[int]:
    """Token ids, at least one, with which a model (:class:`CausalLM`) continues a text: as its tokenizer encodes it.

    Nothing is put in front but what the tokenizer puts there; the byte tokenizer's documents open with id 0. An end of text that a
    tokenizer appends is taken off. An id that the model does not have is a ``ValueError``.
    """
    tokenizer = model.tokenizer
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    ids = _without_end(tokenizer)(text)
    if model.cfg.tokenizer == "byte" and ids[:1] != [0]:
        ids = [0, *ids]
    if bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token):
        ids = ids[1:]  # written out by a chat template, say
    ids = ids or [next((i for i in (bos, eos) if i is not None), 0)]
    if max(ids) >= (rows := model.backbone.embedding.weight.shape[0]):
        raise SourceError(
            f"tokenizer {model.cfg.tokenizer!r}: gives id {max(ids)}, and the model knows {rows}. It is another model's tokenizer."
        )
    return ids


def space_between(tokenizer: Any, before: int, first: int) -> str:
    """Return the space that text behind the token ``before`` begins with, and that decoding it from its ``first`` token on leaves out.

    It is what many (Llama's and Mistral's) take from the beginning of whatever they decode, as they put one in front of what they encode.
    """
    if before in getattr(tokenizer, "all_special_ids", ()):
        return ""  # the text begins here
    left, right = tokenizer.decode([before]), tokenizer.decode([first])
    return " " if tokenizer.decode([before, first]) == f"{left} {right}" else ""


def document_encoder(tokenizer: Any) -> tuple[Callable[[str], Sequence[int]], int]:
    """Return the encoder of training's documents, and the id that stands in front of each, an end of text if there is one."""
    ids = (getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id"))
    return _without_end(tokenizer), next((i for i in ids if i is not None), 0)


def ends_of_text(model: Any) -> list[int]:
    """The ids that end a text of a model (:class:`CausalLM`): its tokenizer's, and what its folder says."""
    said = [getattr(model.tokenizer, "eos_token_id", None)]
    for content in model.metadata.values():
        ids = content.get("eos_token_id")
        said += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(i for i in said if isinstance(i, int)))


def appends_end(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts its end of text behind every text."""
    if isinstance(tokenizer, ByteTokenizer | AsciiTokenizer) or tokenizer.eos_token_id is None:
        return False
    ids, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    # an unknown letter may have the same id
    return ids[-1:] == [tokenizer.eos_token_id] and ids[-len(bare) :] != bare


def _without_end(tokenizer: Any) -> Callable[[str], list[int]]:
    end = -1 if _encoded(lambda text: appends_end(tokenizer), "a") else None
    return lambda text: list(_encoded(tokenizer.encode, text))[:end]


def _encoded(encode: Callable[[str], Any], text: str) -> Any:
    try:
        return encode(text)
    # what its files left out, or say in the wrong kind, shows only now, and in whatever the part that meets it raises
    except Exception as e:
        said = (str(e).strip() or "no reason").splitlines()[0]
        raise SourceError(
            f"tokenizer: cannot encode {text[:40]!r} ({type(e).__name__}: {said}). Its files are damaged, or not all there."
        ) from e


def _is_built_in(tokenizer: str, folder: Path) -> bool:
    # none that is built in has a chat template
    ours = all(_content(folder / name) == content for name, content in tokenizer_files(tokenizer).items())
    return ours and not any(folder.glob("chat_template*"))


def _content(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # transformers says what is wrong with it


def byte_tokenizer(name: str = "byte") -> Any:
    """Return a built-in tokenizer as transformers' class.

    Of the byte tokenizer, ids 1 to 255 are bytes, and 0 is ``<|endoftext|>`` (bos, eos and pad).
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    files = tokenizer_files(name)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(files["tokenizer.json"])),
        **{key: value for key, value in files["tokenizer_config.json"].items() if key in _SPECIAL},
        clean_up_tokenization_spaces=False,
    )


def tokenizer_files(name: str = "byte") -> dict[str, dict[str, Any]]:
    """``tokenizer.json`` and ``tokenizer_config.json`` of a built-in tokenizer, as plain data."""
    symbols, unknown = _byte_symbols(), None
    if name == "byte":
        special, at, known = (
            dict.fromkeys(_SPECIAL, _END),
            0,
            {symbol: byte for byte, symbol in symbols.items() if byte},
        )
    else:
        special, at, unknown = {"pad_token": _PAD}, AsciiTokenizer.pad_token_id, "<other>"
        # ids that no text has are named, since a table without gaps is what everybody can read
        known = {symbols[i] if i in AsciiTokenizer._known else f"<{i:#04x}>": i for i in range(AsciiTokenizer._other)}
        known[unknown] = AsciiTokenizer._other
    (token,) = set(special.values())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {token: at} | known, "merges": [],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": at, "content": token, **flags, "special": True}],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", **special,
        "clean_up_tokenization_spaces": False, "add_bos_token": False, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _byte_symbols() -> dict[int, str]:
    # byte-level BPE writes a byte as a printable character: itself where it has one, else the next free one from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(rest)}


def check_growth(content: dict[str, Any]) -> None:
    """Raise a ``ValueError`` if what a ``tokenizer.json`` says makes a text, or decoded tokens, more than 1,000 times as long."""
    for parts in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        times = math.prod(_growth(content.get(part)) for part in parts)
        if times > _MOST_TIMES:
            raise ValueError(
                f"its {' and '.join(parts)} make a text {times:.3g} times as long, more than {_MOST_TIMES} times"
            )


def _growth(step: Any) -> float:
    if not isinstance(step, dict):
        return 1.0
    times = math.prod(_growth(inner) for name in _STEPS for inner in _items(step.get(name)))
    pattern = step.get("pattern")
    found = pattern.get("String") if isinstance(pattern, dict) else None
    # a regular expression may find single letters
    times *= max(1.0, _size(step.get("content")) / max(1, _size(found)))
    times *= 1 + _size(step.get("prepend"))
    times *= max(1, len(_items(step.get("single"))), len(_items(step.get("pair"))))
    if isinstance(packed := step.get("precompiled_charsmap"), str):
        blob = base64.b64decode(packed)
        # the size of a table of places, the table, and the texts that it points to, each ended by a zero
        texts = blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0")
        if (longest := max(map(len, texts))) > _LONGEST_CHARACTER:
            raise ValueError(f"its normalizer makes a character {longest} bytes long, more than {_LONGEST_CHARACTER}")
    return times


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _size(text: Any) -> int:
    return len(text.encode("utf-8", errors="replace")) if isinstance(text, str) else 0
