"""The rooms of the house: arrows point down, no circle of files, and nothing too long to be read at once. Reads the sources, imports nothing."""

import ast
import re
from functools import cache
from pathlib import Path

import hybridzoo as zoo

ROOT = Path(zoo.__file__).resolve().parent
FLOORS = ("kernels", "layers", "zoo", "eval", "")  # from the ground up; "" are the files at the root
SHARED = ("gpu", "dispatch", "checks", "seq", "numerics", "derivatives", "operators", "contain", "torch_private")
# what an op is built on besides what all share
BUILT_ON = {
    "ssd": {"scan"},
    "layer_node": {"conv"},
    "mamba_layer": {"layer_node", "scan", "conv", "norm"},
    "mamba2_layer": {"layer_node", "ssd", "conv", "norm"},
    "few": {"norm", "step"},
}
LINES, FUNCTION, ARGUMENTS = 350, 60, 8


def sources():
    folders = [ROOT / floor for floor in FLOORS if floor]
    return sorted([*ROOT.glob("*.py"), *(f for folder in folders for f in folder.rglob("*.py"))])


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sources()}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


@cache
def parsed(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def statements(tree, typing):
    """Every import, wherever it stands; those for type checkers alone if ``typing``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if typing:
                yield from statements(node, typing)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from statements(node, typing)


def target(name, node):
    """The module that ``from ... import`` names, or ``None`` if it is not ours."""
    if not node.level:
        return None
    here = name.split(".") if name else []
    here = here if name in PACKAGES else here[:-1]
    here = here[: len(here) - node.level + 1]
    return ".".join([*here, *(node.module.split(".") if node.module else [])])


@cache
def home(module, symbol):
    """The file in which a name that is imported from a module is defined; packages pass on what others define."""
    inside = f"{module}.{symbol}".lstrip(".")
    if inside in FILES and inside not in PACKAGES:
        return inside
    if module in PACKAGES:
        for node in statements(parsed(module), typing=True):
            if isinstance(node, ast.ImportFrom) and symbol in {alias.asname or alias.name for alias in node.names}:
                real = next(alias.name for alias in node.names if (alias.asname or alias.name) == symbol)
                return home(target(module, node), real)
    return inside if inside in FILES else module


@cache
def arrows():
    """``{file: files that it imports from}``, by dotted names."""
    return {
        name: {
            home(to, alias.name)
            for node in statements(parsed(name), typing=False)
            if isinstance(node, ast.ImportFrom) and (to := target(name, node)) is not None
            for alias in node.names
        }
        - {name}
        for name in FILES
    }


def floor(name):
    first = name.split(".")[0]
    return FLOORS.index(first if first in FLOORS else "")


def test_arrows_point_down():
    up = [f"{a} -> {b}" for a, many in arrows().items() for b in many if floor(b) > floor(a) and b != ""]
    assert not up


def test_no_circle_of_files():
    graph = {a: set(many) for a, many in arrows().items()}
    while leaves := [a for a, many in graph.items() if not many]:
        for leaf in leaves:
            del graph[leaf]
        for many in graph.values():
            many.difference_update(leaves)
    # what only leads to a circle is not part of one
    while outer := [a for a in graph if not any(a in many for many in graph.values())]:
        for a in outer:
            del graph[a]
    assert not graph, "\n".join(f"{a} -> {', '.join(sorted(many))}" for a, many in sorted(graph.items()))


def test_ops_know_what_they_are_built_on_and_nothing_of_each_other():
    ops = {name.split(".")[1] for name in FILES if name.count(".") >= 1 and name.startswith("kernels.")} - {*SHARED}
    wrong = []
    for name, many in arrows().items():
        room = name.split(".")[1] if name.startswith("kernels.") else None
        for to in many:
            other = to.split(".")[1] if to.startswith("kernels.") else None
            if room in ops and other in ops and other != room and other not in BUILT_ON.get(room, ()):
                wrong.append(f"{name} -> {to}")
            if room in SHARED and other in ops:
                wrong.append(f"{name} -> {to}")
    assert not wrong


def published():
    """Functions that users call: what packages and the command line pass on may take as many arguments as it needs."""
    for name in PACKAGES | {""}:
        for node in statements(parsed(name), typing=True):
            if isinstance(node, ast.ImportFrom):
                yield from ((home(target(name, node), alias.name), alias.name) for alias in node.names)


def is_schema(function):
    """Whether the signature is not ours to choose: an operator's, its fake's, a command's."""
    return any(
        re.search(r"custom_op|register_fake|\.command|_fake|singledispatch", ast.unparse(d))
        for d in function.decorator_list
    )


def functions():
    for name in FILES:
        for owner in ast.walk(parsed(name)):
            for node in ast.iter_child_nodes(owner):
                if isinstance(node, ast.FunctionDef):
                    yield name, owner, node


def test_files_and_functions_can_be_read_at_once():
    long = [f"{name}: {n} lines" for name, path in FILES.items() if (n := len(path.read_text().splitlines())) > LINES]
    for name, _, node in functions():
        document = node.body[0] if ast.get_docstring(node) else None
        lines = node.end_lineno - node.lineno + 1 - (document.end_lineno - document.lineno + 1 if document else 0)
        if lines > FUNCTION:
            long.append(f"{name}.{node.name}: {lines} lines besides its docstring")
    assert not long


def test_functions_take_few_arguments():
    users, wide = set(published()), []
    for name, owner, node in functions():
        a = node.args
        count = len([*a.posonlyargs, *a.args, *a.kwonlyargs]) - (a.args[:1] != [] and a.args[0].arg in ("self", "cls"))
        constructor = node.name == "__init__" and isinstance(owner, ast.ClassDef)
        mine = (name, owner.name if isinstance(owner, ast.ClassDef) else node.name) in users
        if count > ARGUMENTS and not is_schema(node) and not (mine and (constructor or isinstance(owner, ast.Module))):
            wide.append(f"{name}.{node.name}")
    # lm-eval's and transformers' signatures, and what users call on a model
    theirs = {"eval.harness.__init__", "zoo.hf.forward"}
    tasks = ("causal_lm", "sequence_regression", "token_classification")
    assert {*wide} - theirs == {f"zoo.models.{task}.forward" for task in tasks}


def test_docstrings_begin_with_a_verb_or_name_the_thing():
    riddles = []
    for name in FILES:
        for node in ast.walk(parsed(name)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if re.match(r"(What|How|Which|Where|Why|Whether|When)\b", text):
                    riddles.append(f"{name}.{getattr(node, 'name', '')}: {text.splitlines()[0]}")
    assert not riddles
