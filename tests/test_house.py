"""The house: imports point one way from room to room, in no circle, and kernels know nothing but torch."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import recon

ROOT = Path(recon.__file__).parent
FLOORS = [  # each imports from those above it, and from itself
    {"errors"}, {"kernels"}, {"model"}, {"config"}, {"runtime"}, {"data"},
    {"methods", "evaluate"}, {"study"}, {"paper"}, {"cli"},
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _name(path: Path) -> str:
    return ".".join(("recon", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


SOURCES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(module: str) -> set[str]:
    """Every module that `module` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by a relative name"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = whole & SOURCES.keys()
            found |= modules | ({node.module} if whole - modules else set())
    return found


ARROWS = {(module, other) for module in SOURCES for other in imported(module) if other in SOURCES}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_room():
    assert {room(module) for module in SOURCES if module != "recon"} <= FLOOR.keys()


def test_arrows_point_one_way():
    wrong = [(a, b) for a, b in ARROWS if room(a) != room(b) and FLOOR[room(b)] >= FLOOR[room(a)]]
    assert not wrong


def test_no_circles():
    graph = {module: set() for module in SOURCES}
    for module, other in ARROWS:
        graph[module].add(other)
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", [module for module in SOURCES if module.startswith("recon.kernels")])
def test_kernels_know_nothing_but_torch(module):
    for other in imported(module):
        top = other.partition(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names or other == "recon.errors" or room(other) == "kernels"
