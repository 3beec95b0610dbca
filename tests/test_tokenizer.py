"""A model's tokenizer: where it is, what it never runs, and what a prompt and a document become."""

import base64
import json
import shutil
import types
from pathlib import Path

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo import hub, tokenizer
from hybridzoo.zoo.corpus.encoding import batch_encoder, identity_of
from hybridzoo.zoo.corpus.piece import Piece
from hybridzoo.zoo.tokenizer import (
    AsciiTokenizer,
    ByteTokenizer,
    appends_end,
    check_growth,
    document_encoder,
    encode_prompt,
    ends_of_text,
    from_transformers,
    load_tokenizer,
    whose,
)

pytest.importorskip("transformers")

TINY = ["d_model=16", "layers=mamba"]
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCAB = {c: i for i, c in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz "])}
TEMPLATES = {"bare": None, "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}


def words(template, **special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    if template:
        t.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=t, **special)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A byte model's folder."""
    torch.manual_seed(0)
    return zoo.save(zoo.build("mamba-tiny", TINY), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def named(folder, name, own_files=False):
    """The folder, with a config that names another tokenizer."""
    for file in (folder / "config.yaml", folder / "config.json"):
        text = file.read_text().replace("tokenizer: byte", f"tokenizer: {name}")
        file.write_text(text.replace('"tokenizer": "byte"', f'"tokenizer": {json.dumps(str(name))}'))
    if not own_files:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    return folder


# where it is


def test_a_loaded_model_carries_its_tokenizer(folder, tmp_path):
    assert (
        type(zoo.load(folder).tokenizer) is ByteTokenizer and type(zoo.build("mamba-tiny").tokenizer) is ByteTokenizer
    )
    # one in the folder goes before the config, whatever that says
    words("<s> $A", chat_template="{{ messages[0].content }}").save_pretrained(folder)
    model = zoo.load(folder)
    assert model.tokenizer.encode("ab") == [1, 3, 4] and model.tokenizer is model.tokenizer
    assert model.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    named(folder, "nobody/nothing", own_files=True)
    assert zoo.load(folder).tokenizer.encode("ab") == [1, 3, 4]


@pytest.mark.parametrize("kind", ["hf", "mamba_ssm"])
def test_so_does_one_of_another_library(kind, tmp_path):
    from hybridzoo.zoo.checkpoint import export

    export(zoo.build("mamba-tiny", TINY), tmp_path / "x", to=kind)
    for file in (tmp_path / "x").glob("tokenizer*"):
        file.unlink()
    words("<s> $A").save_pretrained(tmp_path / "x")
    assert zoo.load(tmp_path / "x").tokenizer.encode("ab") == [1, 3, 4]


def test_a_relative_name_is_looked_for_in_the_models_folder(folder, monkeypatch, tmp_path):
    words("<s> $A").save_pretrained(named(folder, "sub") / "sub")
    words(None).save_pretrained(tmp_path / "elsewhere" / "sub")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert zoo.load(folder).tokenizer.encode("ab") == [1, 3, 4]
    assert load_tokenizer("sub").encode("ab") == [3, 4]  # of a config alone, as the user typed it


@pytest.mark.parametrize("name", ["..", "../other", "sub/../../other", "link", "link/deeper"])
def test_a_name_does_not_lead_out_of_the_models_folder(name, folder, tmp_path):
    words(None).save_pretrained(tmp_path / "other" / "deeper")
    words(None).save_pretrained(tmp_path / "other")
    (named(folder, name) / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^tokenizer: '[\w./]+' leads out of .*model, whose config names it\. Put"):
        zoo.load(folder).tokenizer  # noqa: B018
    assert whose(str(tmp_path / "other"), folder) == str(tmp_path / "other")


@pytest.mark.parametrize("how", ["built", "loaded"])
def test_saving_takes_the_tokenizers_files_along(how, folder, monkeypatch, tmp_path):
    words("<s> $A").save_pretrained(named(folder, "sub") / "sub")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    # both names are good for where the process is, or for where the model was, and for nowhere else
    model = zoo.build("mamba-tiny", [*TINY, "tokenizer=model/sub"]) if how == "built" else zoo.load("model")
    zoo.save(model, "here/out")
    monkeypatch.chdir(tmp_path / "here")
    assert zoo.load("out").tokenizer.encode("ab") == [1, 3, 4]
    if how == "loaded":
        assert model.tokenizer.encode("ab") == [1, 3, 4]
    zoo.save(zoo.load("out"), "out")
    assert zoo.load("out").tokenizer.encode("ab") == [1, 3, 4]


def test_a_chat_template_beside_the_byte_tokenizer_is_kept(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    again = zoo.load(zoo.save(zoo.load(folder), tmp_path / "again"))
    assert again.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


# what is refused


def needs_code(folder, mark):
    folder.mkdir()
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\nclass E(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "evil.py").write_text(code)
    auto = {"AutoTokenizer": ["evil.E", "evil.E"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "E", "auto_map": auto}))
    (folder / "config.json").write_text(json.dumps({"model_type": "foo", "auto_map": auto | {"AutoConfig": "evil.E"}}))
    return folder


@pytest.mark.parametrize("where", ["named", "in the folder"])
def test_code_of_a_tokenizer_is_never_run_nor_asked_about(where, folder, monkeypatch, tmp_path):
    from hybridzoo.eval.harness import HybridZooLM
    from hybridzoo.eval.pretrained import open_tokenizer
    from hybridzoo.zoo.hf import HybridZooForCausalLM
    from hybridzoo.zoo.train.run import train

    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked"))
    other, mark = needs_code(tmp_path / "other", tmp_path / "ran"), tmp_path / "ran"
    if where == "named":
        named(folder, other)
    else:
        for name in ("evil.py", "tokenizer_config.json"):
            shutil.copy(other / name, named(folder, "byte") / name)
    model = zoo.load(folder)
    (tmp_path / "text.txt").write_text("some text")
    for ask in (
        lambda: model.tokenizer,
        lambda: encode_prompt(model, "a"),
        lambda: open_tokenizer(None, HybridZooForCausalLM.wrap(model), folder),
        lambda: open_tokenizer(str(other), None, None),
        lambda: train(model, tmp_path / "text.txt", tmp_path / "run", steps=1, device="cpu"),
    ):
        with pytest.raises(
            ValueError, match=r"^tokenizer '.*(other|model)': needs code of its own, which is never run\."
        ):
            ask()
    with pytest.raises(
        ValueError, match=r"^pretrained=.*other: is of a family that the zoo does not know, and needs code of"
    ) as e:
        HybridZooLM(str(other), device="cpu")
    assert "\n" not in str(e.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nothing", "no such folder, and no hub id. Name a folder"),
        (__file__, "no such folder, and no hub id"),
        ("\x1b[31mred", "no such folder, and no hub id"),
        ("empty", "cannot be read"),
        ("broken", "cannot be read"),
        ("nobody/nothing", "no such folder, not downloaded before, and HF_HUB_OFFLINE is set. Check"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_one_line(name, reason, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for made in ("empty", "broken"):
        (tmp_path / made).mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    model = zoo.build("mamba-tiny", TINY)
    model.cfg.tokenizer = name
    with pytest.raises(ValueError) as e:
        model.tokenizer  # noqa: B018
    assert str(e.value).startswith(f"tokenizer {name!r}: {reason}") and "\n" not in str(e.value)


# the hub


class Session:
    def __init__(self, answer):
        self.answer, self.asked = answer, 0

    def head(self, url, timeout):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return types.SimpleNamespace(status_code=self.answer)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (OSError("Connection refused\nmore"), "does not answer (OSError: Connection refused)"),
        (503, "answers 503"),
        (200, None),
        (404, None),
    ],
    ids=str,
)
def test_one_request_decides_whether_the_hub_is_asked(answer, reason, monkeypatch):
    session = Session(answer)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    said = hub.unreachable()
    assert session.asked == 1 and (said is None if reason is None else said.endswith(reason))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.unreachable() == "HF_HUB_OFFLINE is set" and session.asked == 1


@pytest.mark.parametrize("ask", ["model", "tokenizer", "evaluation"])
def test_a_hub_that_does_not_answer_is_not_asked_again(ask, monkeypatch):
    from hybridzoo.eval.harness import HybridZooLM

    session = Session(OSError("Connection refused"))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fail = lambda *args, **kwargs: pytest.fail("asked the hub")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", fail)
    monkeypatch.setattr("huggingface_hub.utils._http._http_backoff_base", fail)
    calls = {
        "model": lambda: zoo.load("nobody/nothing"),
        "tokenizer": lambda: from_transformers("nobody/nothing"),
        "evaluation": lambda: HybridZooLM("nobody/nothing", device="cpu"),
    }
    with pytest.raises(ValueError, match=r"^(pretrained=|tokenizer ')?nobody/nothing'?: .*does not answer") as e:
        calls[ask]()
    assert "\n" not in str(e.value) and 1 <= session.asked <= 2


# what a prompt and a document become


def a_model(template, **special):
    tokens = words(template, **special)
    metadata = {"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [2, 5]}}
    backbone = types.SimpleNamespace(embedding=torch.nn.Embedding(30, 1))
    return types.SimpleNamespace(
        tokenizer=tokens, cfg=types.SimpleNamespace(tokenizer="x"), metadata=metadata, backbone=backbone
    )


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_prompt_is_what_its_tokenizer_makes_of_it(kind):
    model = a_model(TEMPLATES[kind])
    first = [1] if kind in ("bos", "both") else []
    assert appends_end(model.tokenizer) == (kind in ("eos", "both"))
    assert encode_prompt(model, "ab") == [*first, 3, 4]
    assert encode_prompt(model, "<s>ab") == [1, 3, 4]
    assert encode_prompt(model, "ab</s>") == [*first, 3, 4, 2]
    assert encode_prompt(model, "") == [1]
    encode, separator = document_encoder(model.tokenizer)
    assert (encode("ab"), separator) == ([*first, 3, 4], 2)
    assert ends_of_text(model) == [2, 5]


def test_an_unknown_letter_is_no_end_of_text():
    model = a_model(None, eos_token="<unk>")
    assert not appends_end(model.tokenizer) and encode_prompt(model, "aB") == [3, 0]


def test_a_tokenizer_of_another_model_is_said():
    model = a_model(None)
    model.backbone.embedding = torch.nn.Embedding(4, 1)
    with pytest.raises(ValueError, match=r"^tokenizer 'x': gives id 5, and the model knows 4\."):
        encode_prompt(model, "abc")


def test_the_byte_tokenizers_documents_open_with_its_separator(folder):
    model = zoo.load(folder)
    assert (
        encode_prompt(model, "a\0b") == [0, 97, 98] and encode_prompt(model, "") == [0] and ends_of_text(model) == [0]
    )
    encode, separator = document_encoder(model.tokenizer)
    assert (list(encode("ab")), separator) == ([97, 98], 0)
    # saved again by transformers, with a chat template: the same ids
    theirs = from_transformers(str(folder))
    theirs.chat_template = "{{ messages[0].content }}"
    theirs.save_pretrained(folder)
    again = zoo.load(folder)
    assert (
        again.tokenizer.chat_template and encode_prompt(again, "ab") == [0, 97, 98] and encode_prompt(again, "") == [0]
    )


def test_our_folders_do_not_load_the_adapter_for_their_tokenizer(folder, monkeypatch):
    words("<s> $A").save_pretrained(folder)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *a, **k: pytest.fail("loaded a config"))
    assert zoo.load(folder).tokenizer.encode("ab") == [1, 3, 4]


def test_generate_on_the_command_line_writes_what_transformers_does(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM
    from typer.testing import CliRunner

    from hybridzoo.__main__ import app

    torch.manual_seed(3)
    config = MambaConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=1,
        state_size=4,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    theirs = MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    for kind in ("bos", "bare"):
        tokens = words(TEMPLATES[kind])
        tokens.save_pretrained(tmp_path)
        ids = tokens("hello", return_tensors="pt").input_ids
        want = tokens.decode(theirs.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]).removesuffix(
            "</s>"
        )
        command = [
            "generate",
            str(tmp_path),
            "--prompt",
            "hello",
            "--temperature",
            "0",
            "--max-new-tokens",
            "8",
            "--json",
            "--device",
            "cpu",
        ]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0 and json.loads(result.stdout)["text"] == want
    assert tokenizer.encode_prompt(zoo.load(tmp_path), "hello") == ids[0].tolist()


BY_A_THOUSAND = [{"type": "Replace", "pattern": {"String": "l"}, "content": "l" * 1000}] * 4
PER_LETTER = [{"type": "Replace", "pattern": {"Regex": "."}, "content": "0123456789"}] * 9
TWICE_IN_A_ROW = [{"type": "Sequence", "normalizers": BY_A_THOUSAND[:2]}] * 2
PIECES = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000, "pair": []}
LONG = base64.b64encode(bytes(4) + b"x" * 5000 + bytes(1)).decode()


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Sequence", "normalizers": BY_A_THOUSAND}},
        {"normalizer": {"type": "Sequence", "normalizers": PER_LETTER}},
        {"normalizer": {"type": "Sequence", "normalizers": TWICE_IN_A_ROW}},
        {"normalizer": {"type": "Prepend", "prepend": "l" * 100_000}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG}},
        {"post_processor": PIECES | {"special_tokens": {}}},
        {"decoder": {"type": "Sequence", "decoders": BY_A_THOUSAND}},
    ],
    ids=["replace", "replace a pattern", "nested", "prepend", "map", "template", "decoder"],
)
def test_a_small_tokenizer_that_makes_texts_huge_is_refused_before_it_sees_one(tmp_path, change):
    for name, content in tokenizer.tokenizer_files().items():
        (tmp_path / name).write_text(json.dumps(content | (change if name == "tokenizer.json" else {})))
    with pytest.raises(ValueError, match=r"cannot be read \(ValueError: its .* make"):
        from_transformers(str(tmp_path))


def test_tokenizers_as_they_are_published_are_not_refused(tmp_path):
    # Llama's, and a chain of five replacements as T5's has it
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, space, {"type": "NFKC"}]
    check_growth({"normalizer": {"type": "Sequence", "normalizers": steps}, "decoder": None})
    check_growth({"normalizer": {"type": "Sequence", "normalizers": [space | {"pattern": {"Regex": " {2,}"}}] * 5}})
    for content in tokenizer.tokenizer_files().values():
        check_growth(content)


def test_a_tokenizer_that_cannot_encode_says_so_as_one_error(tmp_path):
    model = zoo.build("mamba-tiny", TINY)
    for name, content in tokenizer.tokenizer_files().items():
        wrong = {"model_max_length": "many"} if name == "tokenizer_config.json" else {}
        (tmp_path / name).write_text(json.dumps(content | wrong))
    model.source = tmp_path
    with pytest.raises(ValueError, match=r"tokenizer: cannot encode 'a' \(TypeError"):
        encode_prompt(model, "a text")


def test_a_panic_of_the_library_is_an_error_like_any_other(tmp_path):
    for name, content in tokenizer.tokenizer_files().items():
        broken = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
        (tmp_path / name).write_text(json.dumps(content | (broken if name == "tokenizer.json" else {})))
    with pytest.raises(ValueError, match=r"cannot be read \(PanicException"):
        from_transformers(str(tmp_path))


# the other one that is built in

MIXED = [
    "def f(x):\n\treturn x  # 1\r\n",
    "",
    "naïve Ā € 漢字 🦓 \ufffd",
    "a\x00b\x07c\x7fd\x80",
    "<other> <0x01>",
    "\x0b" * 9,
]


def test_ascii_has_one_id_for_each_byte_and_one_for_all_that_are_not_printable_ascii(tmp_path):
    ours, theirs = AsciiTokenizer(), tokenizer.byte_tokenizer("ascii")
    model = zoo.build("mamba-tiny", [*TINY, "tokenizer=ascii", "vocab_size=130"])
    model.source = zoo.save(model, tmp_path / "m")
    stored = from_transformers(str(model.source))
    for text in MIXED:
        ids = [b if 32 <= b <= 126 or b in (9, 10, 13) else 128 for b in text.encode()]
        assert ours.encode(text) == ids == theirs.encode(text) == stored.encode(text)
    assert ours.encode("a\ud800b") == [97, 98] and ours.decode([97, 128, 129, 10]) == "a\ufffd\n"
    assert len(stored) == stored.vocab_size == ours.vocab_size == 130
    padded = stored(["ab", "c"], padding=True)
    assert padded["input_ids"] == [[97, 98], [99, 129]] and padded["attention_mask"] == [[1, 1], [1, 0]]
    assert stored.pad_token_id == ours.pad_token_id and stored.eos_token_id is None
    assert type(zoo.load(model.source).tokenizer) is AsciiTokenizer is type(model.tokenizer)
    for content in tokenizer.tokenizer_files("ascii").values():
        check_growth(content)


def test_training_reads_ascii_as_it_reads_bytes():
    pieces = [Piece("a file", text, True, 0) for text in MIXED]
    ids = batch_encoder(AsciiTokenizer())(pieces)
    assert [found.tolist() for found in ids] == [AsciiTokenizer().encode(text) for text in MIXED]
    assert document_encoder(AsciiTokenizer())[1] == 0  # an id that no text has
    assert identity_of(AsciiTokenizer()) == "ascii" and identity_of(ByteTokenizer()) == "byte"
