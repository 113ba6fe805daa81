"""docs/tour.md names files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
IN_TREE = re.findall(r"^[│├└─ ]*([A-Za-z_][\w.]*)(?:\(\))? {2,}(\S+\.py)\b", TEXT, re.MULTILINE)
IN_TABLE = re.findall(r"`([A-Za-z_]\w*)` in `([\w/]+\.py)`", TEXT)


def defined(file: Path) -> set[str]:
    """Functions and classes at the top of a module, and ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_tour_names_a_call_tree_and_places_to_add_to():
    names = [name for name, _ in IN_TREE]
    assert names[0] == "register" and {"main", "set_up", "train_step", "score_pairs"} <= set(names)
    assert len(IN_TREE) >= 20 and len(IN_TABLE) >= 10


@pytest.mark.parametrize(("name", "file"), IN_TREE + IN_TABLE)
def test_functions_and_classes_are_where_the_tour_says(name, file):
    assert name in defined(ROOT / file)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`?((?:tokenpref|recipes|scripts)/[\w/]*(?:\.py)?)", TEXT)))
)
def test_files_of_the_tour_exist(path):
    if path == "recipes/tdpo_distributed":  # tune's name for the recipe
        path += ".py"
    assert (ROOT / path).exists()
