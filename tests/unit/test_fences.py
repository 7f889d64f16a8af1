"""Which part of the package may import which, and how long a module may be."""

import ast
import pathlib

import pytest

import rate_limiter

PACKAGE = pathlib.Path(rate_limiter.__file__).parent
PARTS = {"gating", "broker", "celery", "cli", "kombu"}
OURS = {f"rate_limiter.{part}" for part in PARTS}

#: What the modules of each part must not import; "" has the modules at the top.
FENCES = {
    "": {"celery", "kombu", "redis"} | OURS,
    "otel.py": {"celery", "kombu", "redis"} | OURS - {"rate_limiter.gating"},
    "pytest_plugin.py": {"celery", "kombu", "redis"} | OURS - {"rate_limiter.gating"},
    "redis_bucket.py": {"celery", "kombu", "redis"} | OURS,
    "redis_state.py": {"celery", "kombu", "redis"} | OURS,
    "redis_server.py": {"celery", "kombu"} | OURS,
    "redis_asker.py": {"celery", "kombu"} | OURS,
    "redis_gate_bucket.py": {"celery", "kombu"} | OURS,
    "testing.py": {"celery", "kombu", "redis"} | OURS - {"rate_limiter.celery"},
    "gating": {"celery", "kombu", "redis"} | OURS - {"rate_limiter.gating"},
    "broker": {"celery"} | OURS - {"rate_limiter.broker"},
    "celery": {"rate_limiter.kombu"},
    "cli": {"celery", "kombu", "rate_limiter.gating", "rate_limiter.broker", "rate_limiter.kombu"},
    "kombu": {"celery", "rate_limiter.celery"},
}


def imports(source: str, package: str) -> set[str]:
    """Return the full names that a module imports, wherever in it: in functions, for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def behind(fence: set[str], names: set[str]) -> set[str]:
    """Return the names that belong to what a fence shuts out."""
    return {name for name in names for shut in fence if name == shut or name.startswith(f"{shut}.")}


def modules(part: str) -> dict[str, set[str]]:
    """Return what each module of a part, or the one module, imports."""
    if part.endswith(".py"):
        return {part: imports((PACKAGE / part).read_text(), "rate_limiter")}
    package = f"rate_limiter.{part}".rstrip(".")
    files = (
        (PACKAGE / part).rglob("*.py")
        if part
        else {file for file in PACKAGE.glob("*.py") if file.name not in FENCES}
    )
    return {file.name: imports(file.read_text(), package) for file in files}


@pytest.mark.parametrize("part", FENCES)
def test_each_part_stays_behind_its_fence(part):
    """Imports point inward: gates to gating and broker, these to the core; never outward or across."""
    found = modules(part)
    assert found
    assert {name: out for name, names in found.items() if (out := behind(FENCES[part], names))} == {}


def test_every_part_has_a_fence():
    """A new part of the package gets a fence too."""
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == PARTS
    assert {part for part in FENCES if part and not part.endswith(".py")} == PARTS


def lines_of_code(source: str) -> int:
    """Return how many lines a module has without its docstrings, comments and empty lines."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        line
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines = [line.strip() for line in source.splitlines()]
    return sum(
        number not in docs and bool(line) and not line.startswith("#")
        for number, line in enumerate(lines, 1)
    )


def test_a_module_can_be_read_in_one_go():
    """No module has more than 350 lines of code; the bucket alone has, and depends on nothing."""
    long = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if lines_of_code(file.read_text()) > 350
    }
    assert long == {"token_bucket.py"}


@pytest.mark.parametrize("part", FENCES)
def test_imports_of_our_own_are_relative(part):
    """The package has two names, rate_limiter and src.rate_limiter: its own imports must fit both."""
    files = (PACKAGE / part).rglob("*.py") if part else PACKAGE.glob("*.py")
    absolute = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level and node.module)
        if node.module.startswith("rate_limiter")
    ]
    assert absolute == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import celery.app", "celery.app"),
        ("from celery import Task", "celery"),
        ("def f():\n    from kombu.common import QoS", "kombu.common"),
        ("if TYPE_CHECKING:\n    import redis as r", "redis"),
        ("from ..broker.lease import Lease", "rate_limiter.broker.lease"),
        ("from .. import kombu", "rate_limiter.kombu"),
        ("from ..celery.gate import Gate", "rate_limiter.celery.gate"),
    ],
)
def test_the_fence_sees_every_form_of_import(source, found):
    """Absolute, relative, nested, for types: no import escapes the test."""
    names = imports(source, "rate_limiter.gating")
    assert found in names
    assert behind(FENCES["gating"], names)


def test_a_name_that_only_begins_alike_is_no_import_of_it():
    """A module named celeryx, or our own gating.kombu_like, is not behind the fence."""
    assert (
        behind(FENCES["gating"], imports("import celeryx\nfrom .limit import a", "rate_limiter.gating"))
        == set()
    )
