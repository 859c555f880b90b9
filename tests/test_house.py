"""The house: imports point one way from room to room, in no circle; kernels know only torch, and the library no notebooks."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import recon

ROOT = Path(recon.__file__).parent
COMPANION = ROOT.parent / "notebooks" / "companion"
FLOORS = [  # each imports from those above it, and from itself
    {"errors"}, {"kernels"}, {"model"}, {"config"}, {"runtime"}, {"data"}, {"methods", "evaluate"}, {"study"}, {"cli"},
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
SOURCES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def imported(path: Path) -> set[str]:
    """Every module that `path` imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= whole & SOURCES.keys() | ({node.module} if whole - SOURCES.keys() else set())
    return modules


ARROWS = {(module, other) for module, path in SOURCES.items() for other in imported(path)}
INSIDE = {(module, other) for module, other in ARROWS if other in SOURCES}


def room(module: str) -> str:
    return module.split(".")[1]


def test_arrows_point_one_way_between_rooms_that_are_known_and_in_no_circle():
    assert {room(module) for module in SOURCES if module != "recon"} <= FLOOR.keys()
    assert not [(a, b) for a, b in INSIDE if room(a) != room(b) and FLOOR[room(b)] >= FLOOR[room(a)]]
    assert not [module for module, other in ARROWS if other.startswith("companion")]
    graph = {module: {b for a, b in INSIDE if a == module} for module in SOURCES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_kernels_know_nothing_but_torch():
    known = {"torch", *sys.stdlib_module_names}
    others = {other for module, other in ARROWS if module.startswith("recon.kernels.") and other.partition(".")[0] not in known}
    assert {other for other in others if not other.startswith("recon.kernels")} <= {"recon.errors"}


@pytest.mark.parametrize("path", sorted(COMPANION.glob("*.py")), ids=lambda path: path.stem)
def test_the_companion_uses_public_names_only(path):
    assert not [name for name in imported(path) if name.startswith("recon.")]
    used = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)]
    names = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "recon"}
    assert names <= set(recon.__all__)
