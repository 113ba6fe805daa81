"""The directions in which modules may import each other, read from the source without running it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "tokenpref").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))

# Lowest first. A part (file or folder of tokenpref/) may import itself and the parts of the lines above its own.
LAYERS = (
    {"errors"},
    {"__init__", "_checks", "_files", "_memory", "_paths", "_torchtune", "_transformers", "_yaml"},
    {"stats", "_sealed"},
    {"components", "_registry", "ops", "losses", "weights", "rewards"},
    {"distributed"},
    {"data"},
    {"models"},
    {"training", "insight"},
    {"cli"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# The same for the rooms (folders and files) of tokenpref/training/.
ROOMS = (
    {"config", "schedule", "signals"},
    {"recipe", "step", "saving"},
    {"credit", "loading"},
    {"evaluation"},
    {"run"},
    {"trainer"},
    {"estimation"},
    {"__init__"},
)
ROOM_LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# Mathematics: functions of tensors, which know neither configs nor files nor the model library.
MATHEMATICS = {"stats", "ops", "losses", "weights"}
MATHEMATICS_MAY_IMPORT = {"stats", "errors", "_checks", "_memory"}
LIGHT = ("tokenpref", "tokenpref.errors", "tokenpref._paths", "tokenpref._registry", "tokenpref.cli")
# Installed under another name than the one that is imported.
DISTRIBUTION_OF = {"yaml": "pyyaml"}


def part_of(file: Path) -> str:
    return file.relative_to(ROOT / "tokenpref").parts[0].removesuffix(".py")


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "tokenpref" / "training").parts[0].removesuffix(".py")


TRAINING = [file for file in PACKAGE if part_of(file) == "training"]


@cache
def imports(source: str) -> frozenset[str]:
    """Dotted names that a source text imports, anywhere in it, ``from a import b`` as ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the package's root"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def attributes(source: str) -> frozenset[str]:
    """Dotted names that a source text reaches as attributes."""
    return frozenset(ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute))


def uses(source: str, name: str) -> bool:
    """True when a source text imports ``name`` or something below it, or reaches it as an attribute."""
    if any(f"{found}.".startswith(f"{name}.") for found in imports(source)):
        return True
    return "." in name and name in attributes(source)


def parts_imported(file: Path) -> set[str]:
    """Parts of tokenpref that a file imports. ``from tokenpref import __version__`` is its ``__init__``."""
    names = (name.split(".") for name in imports(file.read_text()) if name.split(".")[0] == "tokenpref")
    return {path[1] if len(path) > 1 and path[1] in LEVEL else "__init__" for path in names}


def rooms_imported(file: Path) -> set[str]:
    """Rooms of tokenpref.training that a file imports. ``from tokenpref.training import PreferenceTrainer`` is ``__init__``."""
    names = (name.split(".") for name in imports(file.read_text()))
    found = {path[2] if len(path) > 2 else "" for path in names if path[:2] == ["tokenpref", "training"]}
    return {room if room in ROOM_LEVEL else "__init__" for room in found}


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, from their dotted names and source texts; none if there is no circle."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        # ``from package import name`` is the module of that name if there is one, and otherwise the package.
        names = {name if name in sources else name.rpartition(".")[0] for name in imports(source)}
        graph[module] = names & sources.keys() - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def shown(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


@pytest.mark.parametrize(
    ("source", "name", "used"),
    [
        ("import torch.distributed as dist", "torch.distributed", True),
        ("from torch import distributed", "torch.distributed", True),
        ("def f():\n    from torch.distributed.fsdp import FSDPModule", "torch.distributed", True),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed", True),
        ("import torch\nfrom torch.distributions import Normal", "torch.distributed", False),
        ("from tokenpref import _torchtune", "torchtune", False),
        ("from torchtune import training", "torchtune", True),
    ],
)
def test_the_reader_sees_every_way_to_import(source, name, used):
    assert uses(source, name) is used


def test_every_part_has_its_place():
    assert PACKAGE
    assert RECIPES
    unknown = {part_of(file) for file in PACKAGE} - set(LEVEL)
    assert not unknown, f"give {unknown} a line in LAYERS and a line in CONTRIBUTING.md"
    unknown = {room_of(file) for file in TRAINING} - set(ROOM_LEVEL)
    assert not unknown, f"give {unknown} a line in ROOMS and a line in CONTRIBUTING.md"


@pytest.mark.parametrize("file", PACKAGE, ids=shown(PACKAGE))
def test_imports_run_one_way(file):
    part = part_of(file)
    above = {other for other in parts_imported(file) - {part} if LEVEL[other] >= LEVEL[part]}
    assert not above, f"{part} may not import {above}"
    if part in MATHEMATICS:
        further = parts_imported(file) - MATHEMATICS_MAY_IMPORT - {part}
        assert not further, f"{part} works on tensors alone and may not import {further}"


@pytest.mark.parametrize("file", TRAINING, ids=shown(TRAINING))
def test_rooms_of_training_import_one_way(file):
    room = room_of(file)
    above = {other for other in rooms_imported(file) - {room} if ROOM_LEVEL[other] >= ROOM_LEVEL[room]}
    assert not above, f"training/{room} may not import {above}"


@pytest.mark.parametrize(
    ("a", "b", "c", "found"),
    [
        ("import p.b", "import p.c", "import torch", set()),
        ("import p.b", "from p.c import function", "def f():\n    from p import a", {"p.a", "p.b", "p.c"}),
        ("from p.a import itself", "import p.c", "from p.b import x", {"p.b", "p.c"}),
        ("from p import name", "", "", {"p", "p.a"}),
    ],
)
def test_circles_are_found(a, b, c, found):
    assert set(circle({"p": "from p.a import A", "p.a": a, "p.b": b, "p.c": c})) == found


def test_no_modules_import_each_other():
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in PACKAGE]
    sources = [file.read_text() for file in PACKAGE]
    found = circle(dict(zip((name.removesuffix(".__init__") for name in names), sources, strict=True)))
    assert not found, f"open this circle: {' imports '.join(found)}"


@pytest.mark.parametrize(
    ("library", "owner"),
    [("torch.distributed", "distributed"), ("torchtune", "_torchtune"), ("transformers", "_transformers")],
)
def test_one_owner_for_each_library_behind_a_wall(library, owner):
    users = [file for file in PACKAGE + RECIPES if uses(file.read_text(), library)]
    assert any(file in PACKAGE and part_of(file) == owner for file in users)
    others = [file for file in users if file in RECIPES or part_of(file) != owner]
    assert not others, f"only tokenpref/{owner} imports {library}, not {shown(others)}"


def test_one_maker_of_models():
    """Adapters and other kinds of models have one place to be added in."""
    maker = "tokenpref.training.loading.models"
    steps = ("read_weights", "place_decoder", "check_decoder", "choose_trainable")
    own = ROOT / "tokenpref/training/loading/models.py"
    others = [file for file in PACKAGE + RECIPES if file != own]
    builders = [f for f in others if any(uses(f.read_text(), f"{maker}.{step}") for step in steps)]
    assert not builders, (
        f"ask ModelMaker of {maker} for models, instead of building them in {shown(builders)}"
    )
    readers = [f for f in others if re.search(r"\.load_checkpoint\(|load_full_state_dict\(", f.read_text())]
    readers = [f for f in readers if part_of(f) != "distributed"]
    assert not readers, (
        f"ask ModelMaker of {maker} for models with weights, instead of reading in {shown(readers)}"
    )


@pytest.mark.parametrize("file", RECIPES, ids=shown(RECIPES))
def test_recipes_are_thin(file):
    source = file.read_text()
    assert len(source.splitlines()) < 100
    assert not uses(source, "torch"), "arithmetic belongs into tokenpref/"
    assert ast.get_docstring(ast.parse(source)), "say what it trains and show a command"


def test_every_library_is_a_declared_dependency():
    declared = {
        re.split(r"[^\w-]", line)[0].lower().replace("_", "-")
        for line in importlib.metadata.requires("tokenpref") or []
        if not re.search(r"extra == .(dev|lint|test).", line)
    }
    found = {name.split(".")[0] for file in PACKAGE + RECIPES for name in imports(file.read_text())}
    # PyTorch for CUDA brings Triton along, and nothing asks for it elsewhere.
    third_party = found - set(sys.stdlib_module_names) - {"tokenpref", "triton"}
    missing = {n for n in third_party if DISTRIBUTION_OF.get(n, n).lower().replace("_", "-") not in declared}
    assert "torch" in third_party
    assert not missing, f"{missing} must stand in pyproject.toml"


def test_light_modules_do_not_load_torch():
    code = f"import sys, {', '.join(LIGHT)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
