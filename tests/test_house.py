"""The house that the package lives in: which room may import which, how long things are, what is public, and two walks."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
import timm

import drifa_attn
from drifa_attn import MFA

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "drifa_attn"
FILES = sorted(PACKAGE.rglob("*.py"))
GROUND = {"functional", "layout", "trees", "checks", "randomness"}

# What each room may import besides itself.
ARROWS = {
    "functional": set(),
    "trees": set(),
    "randomness": set(),
    "layout": {"functional", "trees", "checks"},
    "checks": {"functional", "trees", "layout"},
    "ops": GROUND,
    "attention": GROUND | {"ops"},
    "network": GROUND,
    "wrapping": GROUND | {"attention", "network"},
    "fusion": GROUND | {"attention", "network", "wrapping"},
    "uncertainty": GROUND | {"network", "wrapping"},
    "files": GROUND | {"attention", "network", "wrapping", "fusion"},
    "plot": GROUND | {"network", "wrapping", "fusion", "uncertainty"},
    "commands": GROUND | {"ops", "attention", "network", "wrapping", "fusion", "uncertainty", "files", "plot", "__version__"},
    "__main__": {"commands"},
}
FOREIGN = {"timm", "numpy", "tests", "examples", "benchmarks"}
DRAWING = {"matplotlib", "pytorch_grad_cam"}  # which only pictures may know


def room(path):
    """The room of a file of the package, or the file itself on the ground."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The names of the modules that a file imports, relative ones made absolute."""
    package = ["drifa_attn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [above, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "drifa_attn" else [module]


def drawn(path):
    """The rooms that a file imports, and the other packages that it may not know."""
    mine, rooms, foreign = room(path), set(), set()
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "drifa_attn":
            rooms.add(rest[0])
        elif path.name == "foreign.py" and name == "timm.layers":
            continue  # whose attentions it takes by their names
        elif mine == "commands" and top == "timm":
            continue  # whose networks it takes by their names
        elif top in FOREIGN or (top == "triton" and mine != "ops") or (top in DRAWING and mine != "plot"):
            foreign.add(name)
    return rooms - {mine}, foreign


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=lambda p: p.name)
def test_no_arrow_is_drawn_back(path):
    rooms, foreign = drawn(path)
    assert rooms <= ARROWS[room(path)], f"{path.name} imports {sorted(rooms - ARROWS[room(path)])}"
    assert not foreign, f"{path.name} imports {foreign}"


def test_an_arrow_that_is_drawn_back_is_found(tmp_path, monkeypatch):
    """The test above sees every way to write an import."""
    for line in (
        "from drifa_attn import wrapping",
        "from drifa_attn.wrapping.plan import plan",
        "import drifa_attn.wrapping",
        "from ..wrapping import plan",
        "def f():\n    from drifa_attn.wrapping import plan",
    ):
        path = tmp_path / "network" / "spoilt.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(line)
        monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
        assert drawn(path)[0] == {"wrapping"}, line


def test_the_rooms_are_those_of_the_design():
    assert {room(path) for path in FILES} == {*ARROWS, "__init__"}


def lines(node):
    """The lines of a function without its decorators, its signature and its docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def positional(node):
    """How many parameters can be given by position, `self` left out."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    return len([name for name in names if name not in ("self", "cls")])


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    if room(path) == "ops":
        return
    assert len(path.read_text().splitlines()) <= 350
    assert not [f"{node.name}: {lines(node)} lines" for node in functions(path) if lines(node) > 40]
    assert not [f"{node.name}: {positional(node)} parameters" for node in functions(path) if positional(node) > 6]


# What users see ----------------------------------------------------------------------------------------------------------


def surface():
    """Every public name with its parameters; of a class also its public methods."""
    found = []
    for name in sorted(drifa_attn.__all__):
        thing = getattr(drifa_attn, name)
        if inspect.ismodule(thing):
            found += [f"{name}.{inner}" for inner in sorted(getattr(thing, "__all__", []))]
            continue
        found.append(f"{name}({', '.join(inspect.signature(thing).parameters)})")
        if inspect.isclass(thing):
            methods = [m for m in vars(thing) if not m.startswith("_") and inspect.isfunction(vars(thing)[m])]
            found += [f"{name}.{m}({', '.join(inspect.signature(vars(thing)[m]).parameters)})" for m in sorted(methods)]
    return found


def test_the_public_surface_is_the_written_one():
    """A name that comes, goes or changes its parameters is a decision: write it down, and in the changelog."""
    assert surface() == (Path(__file__).with_name("surface.txt")).read_text().splitlines()


# Walks -------------------------------------------------------------------------------------------------------------------


def calls(function):
    """The files of the package whose functions are called, in order, with the files around them, code and arguments."""
    seen, stack, frames = [], [], {}

    def watch(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call":
            stack.append(path)
            if path.startswith(str(PACKAGE)) and id(frame) not in frames:
                frames[id(frame)] = frame  # a generator that goes on is not called again
                seen.append((path, tuple(stack[:-1]), frame.f_code, {type(value) for value in frame.f_locals.values()}))
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen


def is_flow(code):
    """Whether a call passes the flow on: not a lambda or generator expression, and no property or method of a record."""
    return not code.co_name.startswith("<") and code.co_name not in ("name", "positions", "__init__", "__post_init__")


def test_a_model_walks_through_wrap_without_turning_back():
    """`model`, or its copy, through `wrap`: at most eight files of `wrapping` and `network`, none entered again once left."""
    model = timm.create_model("resnet10t")
    drifa_attn.wrap(timm.create_model("resnet10t"))  # what is imported late is imported now
    rooms = {str(PACKAGE / "wrapping"), str(PACKAGE / "network")}
    walk = [
        (path, stack)
        for path, stack, code, given in calls(lambda: drifa_attn.wrap(model))
        if str(Path(path).parent) in rooms and is_flow(code) and type(model) in given
    ]
    visited, again = [], []
    for path, stack in walk:
        if path in stack:  # it has not been left
            continue
        (again if path in visited else visited).append(path)
    assert not again, f"entered again: {sorted({Path(path).name for path in again})}"
    assert len(visited) <= 8, [Path(path).name for path in visited]


def test_every_attention_is_built_once(monkeypatch):
    built = []
    start = MFA.__init__
    monkeypatch.setattr(MFA, "__init__", lambda self, *args, **kwargs: (built.append(1), start(self, *args, **kwargs))[1])
    drifa_attn.wrap(timm.create_model("resnet10t"))
    assert len(built) == 5


# Import ------------------------------------------------------------------------------------------------------------------


def test_examples_import_public_names_alone():
    for path in sorted((ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "drifa_attn":
                assert node.module == "drifa_attn", f"{path.name}: from {node.module}"
                assert {alias.name for alias in node.names} <= {*drifa_attn.__all__}, path.name
            if isinstance(node, ast.Import):
                assert not [a.name for a in node.names if a.name.startswith("drifa_attn.")], path.name
