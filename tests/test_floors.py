"""An import only goes down; sched is pure, comm decides nothing, adapters use public names."""

import ast
import pathlib
import sys

import pytest

EPMOE = pathlib.Path(__file__).parents[1] / "epmoe"

# The longest name that fits wins; a file of the top level without a line here is on LAYER.
LAYER = 5
FLOORS = {
    "config": 0,
    "errors": 0,
    "formats": 1,
    "context": 1,
    "sched": 1,
    "reference": 1,
    "comm.heap": 1,  # what a heap promises; the heaps themselves live on 3
    "comm.atomics": 1,
    "comm.layout": 1,
    "comm.words": 1,
    "comm.fds": 2,
    "comm.peer": 2,
    "comm.watch": 2,
    "comm.meeting": 2,
    "comm.launcher": 2,
    "comm.door": 2,
    "comm.mesh": 2,
    "comm.message": 2,
    "comm.hub": 2,
    "comm.group": 2,
    "comm": 3,
    "kernels": 4,
    "": 6,  # the public names
    "__main__": 7,
    "cli": 7,
    "flashinfer": 7,
    "local": 6,
    "sglang": 7,
    "torchtitan": 7,
    "transformers": 7,
    "vllm": 7,
}
SCHED_MAY = {"torch", "numpy", "epmoe.config", "epmoe.errors"} | set(sys.stdlib_module_names)
# The command line is no leaf: its verbs print layouts and time parts that have no public name.
LEAVES = ("flashinfer", "sglang", "torchtitan", "transformers", "vllm")


def modules():
    """Name inside the package → file, for every module of the package."""
    found = {}
    for path in sorted(EPMOE.rglob("*.py")):
        parts = path.relative_to(EPMOE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(name, source, is_package):
    """(line, full name) of everything that ``name`` imports; a submodule counts as itself."""
    here = ["epmoe", *name.split(".")] if name else ["epmoe"]
    package = here if is_package else here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full.removeprefix("epmoe.") in MODULES else base


def imported(name):
    path = MODULES[name]
    return list(imports(name, path.read_text(), path.name == "__init__.py"))


def inside(target):
    """The name inside the package, or None for somebody else's module."""
    if target == "epmoe":
        return ""
    return target.removeprefix("epmoe.") if target.startswith("epmoe.") else None


def floor(name):
    fits = name
    while fits not in FLOORS:
        head, dot, _ = fits.rpartition(".")
        if not dot:
            return LAYER
        fits = head
    return FLOORS[fits]


@pytest.mark.parametrize("name", MODULES)
def test_an_import_only_goes_down(name):
    up = [
        f"line {line}: {target} (floor {floor(inside(target))})"
        for line, target in imported(name)
        if inside(target) is not None and floor(inside(target)) > floor(name)
    ]
    assert not up, f"{MODULES[name]} (floor {floor(name)}) imports upwards: {'; '.join(up)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "sched"])
def test_sched_imports_only_floor_0_and_arithmetic(name):
    strange = [
        f"line {line}: {target}"
        for line, target in imported(name)
        if target not in SCHED_MAY
        and target.split(".")[0] not in SCHED_MAY
        and not target.startswith("epmoe.sched")
    ]
    assert not strange, f"{MODULES[name]} imports {'; '.join(strange)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "comm"])
def test_comm_never_imports_sched_or_kernels(name):
    wrong = [
        f"line {line}: {target}"
        for line, target in imported(name)
        if (inside(target) or "").split(".")[0] in ("sched", "kernels")
    ]
    assert not wrong, f"{MODULES[name]} imports {'; '.join(wrong)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in LEAVES])
def test_an_engine_adapter_imports_only_public_names(name):
    private = [
        f"line {line}: {target}"
        for line, target in imported(name)
        if inside(target) and inside(target).split(".")[0] != name.split(".")[0]
    ]
    assert not private, f"{MODULES[name]} imports {'; '.join(private)}; use `from epmoe import`"


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("comm.words", "from epmoe.sched.plan import plan", "epmoe.sched.plan"),
        ("comm.words", "from epmoe import sched", "epmoe.sched"),
        ("comm.words", "from ..sched import plan", "epmoe.sched.plan"),
        ("comm.words", "def f():\n    import epmoe.moe", "epmoe.moe"),
        ("sched.plan", "from . import route", "epmoe.sched.route"),
        ("sched.plan", "from epmoe.errors import EpmoeError", "epmoe.errors"),
        ("vllm", "from epmoe import MoE", "epmoe"),
    ],
)
def test_no_form_of_import_is_missed(name, source, found):
    assert [target for _, target in imports(name, source, is_package=False)] == [found]
