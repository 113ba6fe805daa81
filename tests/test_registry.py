from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tokenpref import _registry
from tokenpref._paths import data_root
from tokenpref._registry import (
    RECIPE_OF_METHOD,
    config_files,
    find_config,
    recipe_files,
    recipe_of,
    register,
)


@dataclass
class Config:
    name: str
    file_path: str


@dataclass
class Recipe:
    name: str
    file_path: str
    configs: list[Config]
    supports_distributed: bool


def registry(*recipes):
    """What torchtune's registry module offers."""
    entries = list(recipes)
    return SimpleNamespace(
        Config=Config, Recipe=Recipe, _ALL_RECIPES=entries, get_all_recipes=lambda: entries
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder with two recipes and three configs, in place of the real one."""
    root = tmp_path / "package"
    for name in ("recipes/tdpo_distributed.py", "recipes/evaluate_distributed.py", "recipes/_shared.py"):
        write(root / name)
    for name in ("tiny/tdpo", "tiny/evaluate", "big/7B_dpo_lora"):
        write(root / f"configs/{name}.yaml")
    monkeypatch.setattr(_registry, "data_root", lambda: root)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return root


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def test_every_shipped_config_has_a_recipe_and_every_method_too():
    recipes = recipe_files()
    assert recipes
    assert config_files()
    for name, file in config_files().items():
        assert recipe_of(file.stem) in recipes, name
    for method, recipe in RECIPE_OF_METHOD.items():
        assert recipe in recipes, method


@pytest.mark.parametrize(
    ("stem", "recipe"),
    [
        ("tdpo", "tdpo_distributed"),
        ("1B_tdpo", "tdpo_distributed"),
        ("0.5B_tdpo1", "tdpo_distributed"),
        ("135M_dpo_lora", "tdpo_distributed"),
        ("135M_evaluate", "evaluate_distributed"),
    ],
)
def test_the_method_in_the_name_decides(stem, recipe):
    assert recipe_of(stem) == recipe


@pytest.mark.parametrize("stem", ["1B_sft", "tdpox", "dpos", "1B", "small_dpo", "135M-dpo"])
def test_other_names_have_no_recipe(stem):
    with pytest.raises(ValueError, match=f"{stem!r} names no known method"):
        recipe_of(stem)


def test_longer_method_wins(monkeypatch):
    monkeypatch.setitem(RECIPE_OF_METHOD, "tdpo_stored", "other_distributed")
    assert recipe_of("1B_tdpo_stored") == "other_distributed"
    assert recipe_of("1B_tdpo_other") == "tdpo_distributed"


def test_register_adds_recipes_with_their_configs(package):
    theirs = Recipe("full_finetune_distributed", "full_finetune_distributed.py", [], True)
    target = registry(theirs)
    register(target)
    assert target._ALL_RECIPES == [
        theirs,
        Recipe(
            "recipes/evaluate_distributed",
            str(package / "recipes/evaluate_distributed.py"),
            [Config("tiny/evaluate", str(package / "configs/tiny/evaluate.yaml"))],
            True,
        ),
        Recipe(
            "recipes/tdpo_distributed",
            str(package / "recipes/tdpo_distributed.py"),
            [
                Config("big/7B_dpo_lora", str(package / "configs/big/7B_dpo_lora.yaml")),
                Config("tiny/tdpo", str(package / "configs/tiny/tdpo.yaml")),
            ],
            True,
        ),
    ]


def test_register_keeps_what_is_there(package):
    own = Recipe("recipes/tdpo_distributed", "/elsewhere.py", [], False)
    target = registry(own)
    register(target)
    register(target)
    assert [recipe.name for recipe in target._ALL_RECIPES] == [
        "recipes/tdpo_distributed",
        "recipes/evaluate_distributed",
    ]
    assert target._ALL_RECIPES[0] is own


def test_configs_without_a_recipe_are_named_after_the_rest_is_registered(package):
    write(package / "configs/tiny/guess.yaml")
    (package / "recipes/evaluate_distributed.py").unlink()
    target = registry()
    with pytest.raises(ValueError, match="'guess' names no known method") as error:
        register(target)
    assert "'tiny/evaluate' belongs to recipes/evaluate_distributed.py, which does not exist" in str(
        error.value
    )
    assert [recipe.name for recipe in target._ALL_RECIPES] == ["recipes/tdpo_distributed"]


@pytest.mark.parametrize("text", ["configs/tiny/tdpo.yaml", "tiny/tdpo.yaml", "tiny/tdpo"])
def test_find_config_inside_the_package(package, text):
    assert find_config(text) == package / "configs/tiny/tdpo.yaml"


def test_find_config_prefers_the_current_directory(package):
    mine = Path("configs/tiny/tdpo.yaml").absolute()
    write(mine)
    assert find_config("configs/tiny/tdpo.yaml") == mine
    assert find_config(str(mine)) == mine


@pytest.mark.parametrize("text", ["missing.yaml", "tiny", "../package/configs/tiny/tdpo.yaml.bak"])
def test_find_config_that_is_nowhere(package, text):
    found = find_config(text)
    assert found == Path(text).absolute()
    assert not found.is_file()


def test_find_config_does_not_leave_the_package(package):
    write(package.parent / "secret.yaml")
    assert find_config("../../x/../secret.yaml") == Path("../../x/../secret.yaml").absolute()


def test_find_config_by_package_path():
    name, file = next(iter(config_files().items()))
    assert find_config(f"package://configs/{name}.yaml") == file.resolve()
    assert file.is_relative_to(data_root())
