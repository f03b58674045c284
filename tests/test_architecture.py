"""The house: each module imports only from rooms below its own, none in a circle, and the light half stays light."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sdfit

PACKAGE = Path(sdfit.__file__).resolve().parent
ROOMS = (
    "errors", "files", "units", "workload", "equation", "predict", "guard", "records", "backends", "sweep", "fit",
    "judging", "study", "cli",
)  # fmt: skip
"""From the ground up."""
LIGHT = ("errors", "files", "units", "workload", "equation", "predict", "guard")
"""What predicting needs: numpy and the standard library only."""
MOST_MODULES, MOST_FOLDERS = 5, 9


class Arrow(NamedTuple):
    """An import: from which module, of which module, in which line, and whether it runs when the module is loaded."""

    module: str
    of: str
    line: int
    at_once: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} -> {self.of}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, a folder under its own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(node: ast.AST, at_once: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below a node, those inside functions and under TYPE_CHECKING included (neither runs at once)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once
            continue
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from imports(child, at_once and not inside and not typing_only)


def imported(module: str, statement: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement names; of ``from sdfit.x import y`` it is sdfit.x.y where that is a module."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    origin = statement.module or ""
    if statement.level:
        package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
        above = package.split(".")[: len(package.split(".")) - statement.level + 1]
        origin = ".".join([*above, *([statement.module] if statement.module else [])])
    names = [f"{origin}.{alias.name}" for alias in statement.names]
    return sorted({name if name in modules() else origin for name in names})


@cache
def arrows() -> tuple[Arrow, ...]:
    """Every import of every module; one that names a module by text (`import_module("sdfit.x")`) too."""
    found = []
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for statement, at_once in imports(tree):
            found += [Arrow(module, of, statement.lineno, at_once) for of in imported(module, statement)]
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__"):
                texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found += [Arrow(module, of, call.lineno, False) for of in texts]
    return tuple(found)


def inside() -> list[Arrow]:
    """The imports of one part of the package by another."""
    return [arrow for arrow in arrows() if arrow.of.split(".")[0] == "sdfit"]


def room(module: str) -> str:
    """The module or folder at the top of the package that a module is or lies in; '' for the package itself."""
    return [*module.split("."), ""][1]


def shown(found: list[Arrow]) -> str:
    """A line per import, for the message of a test that fails."""
    return f"{len(found)} imports that must not be:\n" + "\n".join(f"  {arrow}" for arrow in sorted(found))


def test_every_room_has_a_floor() -> None:
    """Each module and folder at the top is in the list of rooms, and each room of the list is there."""
    assert sorted({room(module) for module in modules()} - {""}) == sorted(ROOMS)


def test_the_top_is_seen_at_a_glance() -> None:
    """At most five modules beside ``__init__``, and at most nine folders of modules."""
    files = {room(m) for m, path in modules().items() if path.parent == PACKAGE} - {""}
    folders = {room(m) for m, path in modules().items() if path.parent != PACKAGE}
    assert len(files) <= MOST_MODULES, sorted(files)
    assert len(folders) <= MOST_FOLDERS, sorted(folders)


def test_the_plan_shows_the_rooms_in_their_order() -> None:
    """The table in sdfit/README.md lists the rooms from the ground up, and the page stays one screen long."""
    lines = (PACKAGE / "README.md").read_text(encoding="utf-8").splitlines()
    first_cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    assert tuple(re.findall(r"`(\w+)(?:\.py|/)`", " ".join(first_cells))) == ROOMS
    assert len(lines) <= 50


def test_imports_go_only_downwards() -> None:
    """No room imports from one above it, not in a function and not for types only."""
    floor = {name: number for number, name in enumerate(ROOMS)}
    upwards = [
        arrow
        for arrow in inside()
        if room(arrow.module) and floor.get(room(arrow.of), -1) > floor.get(room(arrow.module), len(ROOMS))
    ]
    assert not upwards, shown(upwards)


def test_the_public_names_come_from_the_light_half() -> None:
    """``sdfit/__init__.py`` imports nothing above the guard, and what it gives out later exists and is no higher."""
    heavy = [arrow for arrow in inside() if not room(arrow.module) and room(arrow.of) not in LIGHT]
    later = set(sdfit._LATER.values()) | {f"sdfit.{name}" for name in sdfit._MODULES}
    assert not heavy, shown(heavy)
    assert {room(module) for module in later} <= set(LIGHT) and later <= set(modules())


def test_no_module_imports_itself_in_a_circle() -> None:
    """Following imports, those in functions too, never leads back to where one began."""
    below: dict[str, set[str]] = {module: set() for module in modules()}
    for arrow in inside():
        if room(arrow.module) and room(arrow.of) and arrow.of != arrow.module:
            below[arrow.module].add(arrow.of)
    circles = [circle for circle in tied(below) if len(circle) > 1]
    assert not circles, "circles of imports:\n" + "\n".join(
        f"  {arrow}" for circle in circles for arrow in sorted(inside()) if {arrow.module, arrow.of} <= circle
    )


def tied(below: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected parts of a graph: what can be reached from where and back."""
    reached: dict[str, set[str]] = {}
    for start in below:
        seen, todo = set(), [start]
        while todo:
            new = below.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        reached[start] = seen
    return [
        {other for other in seen if start in reached.get(other, ())} | {start}
        for start, seen in reached.items()
        if start in seen and start == min({other for other in seen if start in reached.get(other, ())} | {start})
    ]


def test_the_flow_does_not_need_the_study() -> None:
    """Nothing but the study itself and the command line imports the study."""
    found = [a for a in inside() if room(a.of) == "study" and room(a.module) not in ("study", "cli")]
    assert not found, shown(found)


def test_a_measurement_does_not_need_the_simulator() -> None:
    """Of the backends only the trace imports the trace, but that the door to them all opens it by name, in a function."""
    trace = "sdfit.backends.trace"
    found = [
        a
        for a in inside()
        if room(a.module) == "backends"
        and f"{a.of}.".startswith(f"{trace}.")
        and not f"{a.module}.".startswith(f"{trace}.")
        and (a.module != "sdfit.backends" or a.at_once)
    ]
    assert not found, shown(found)


def test_the_light_half_imports_numpy_and_the_standard_library() -> None:
    """At module level the light half imports nothing else; what else it needs it imports where it is used."""
    allowed = {*sys.stdlib_module_names, "numpy", "sdfit"}
    found = [a for a in arrows() if a.at_once and room(a.module) in ("", *LIGHT) and a.of.split(".")[0] not in allowed]
    assert not found, shown(found)


PROGRAM = """
import json, sys, warnings
before = set(sys.modules)
warnings.simplefilter("ignore")
import sdfit
sdfit.load("t4")(512, 512)
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_a_prediction_loads_numpy_and_the_standard_library() -> None:
    """A process that loads a shipped model and predicts has nothing else in memory, not even joblib."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    foreign = set(json.loads(ran.stdout)) - set(sys.stdlib_module_names) - {"numpy", "sdfit"}
    assert not foreign, sorted(foreign)


def test_tests_do_not_import_each_other() -> None:
    """What tests share lies in helpers (worlds, tiny, ...) and fixtures in conftest; none imports a test or conftest."""
    tests = Path(__file__).parent
    found = []
    for path in sorted(tests.rglob("*.py")):
        for statement, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in statement.names] if isinstance(statement, ast.Import) else [statement.module or ""]
            last = [name.split(".")[-1] for name in names]
            found += [
                f"  {path.relative_to(tests)}:{statement.lineno} -> {name}"
                for name in last
                if name == "conftest" or name.startswith("test_")
            ]
    assert not found, "tests that import tests:\n" + "\n".join(found)


def test_the_reader_of_imports_sees_what_hides() -> None:
    """Imports in functions and under TYPE_CHECKING are seen and known not to run at once; submodules are found."""
    tree = ast.parse(
        "import json\n"
        "if TYPE_CHECKING:\n    from sdfit.fit import fit\n"
        "class A:\n    import numpy as np\n    def f(self):\n        try:\n            from sdfit.workload import Workload\n"
        "        finally:\n            pass\n"
    )
    got = [(name, once) for statement, once in imports(tree) for name in imported("sdfit.predict.table", statement)]
    assert got == [("json", True), ("sdfit.fit.fit", False), ("numpy", True), ("sdfit.workload", False)]
    relative = ast.parse("from . import sizes\nfrom ..workload import Workload").body
    names = [imported("sdfit.equation.terms", statement) for statement in relative]  # type: ignore[arg-type]
    assert names == [["sdfit.equation.sizes"], ["sdfit.workload"]]
    assert tied({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


def test_no_two_test_modules_have_one_name() -> None:
    """pytest imports them by their last name alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
