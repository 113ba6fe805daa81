"""The names of our recipes and configs in ``tune``, and their files."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from tokenpref._paths import data_root, resolve_path

__all__ = ["RECIPE_OF_METHOD", "config_files", "find_config", "recipe_files", "recipe_of", "register"]

RECIPE_OF_METHOD = {
    "dpo": "tdpo_distributed",
    "tdpo": "tdpo_distributed",
    "tis": "tis_dpo_distributed",
    "ti": "ti_dpo_distributed",
    "contrastive_reference": "contrastive_reference_distributed",
    "estimate_weights": "estimate_weights_distributed",
    "evaluate": "evaluate_distributed",
}
"""The recipe of a config, by the method in the config's name. A new recipe adds its methods here."""

_SIZE = re.compile(r"^\d+(\.\d+)?[KMBT]_")


def recipe_of(config_stem: str) -> str:
    """Stem of the recipe that a config belongs to.

    Args:
        config_stem: file name of a config without ``.yaml``: ``<size>_<method>`` (``135M_tdpo``) or, for models
            without sizes, ``<method>``. The method may carry a variant: ``tdpo1``, ``dpo_lora``.

    Returns:
        File stem below ``recipes/``, such as ``tdpo_distributed``.

    Raises:
        ValueError: if no entry of ``RECIPE_OF_METHOD`` fits.
    """
    name = _SIZE.sub("", config_stem)
    fitting = [m for m in RECIPE_OF_METHOD if name.startswith(m) and not name[len(m) :][:1].isalpha()]
    if not fitting:
        raise ValueError(
            f"config {config_stem!r} names no known method; name it <size>_<method>.yaml with a method of "
            f"{', '.join(RECIPE_OF_METHOD)}, or add the method to RECIPE_OF_METHOD in tokenpref/_registry.py"
        )
    return RECIPE_OF_METHOD[max(fitting, key=len)]


def recipe_files() -> dict[str, Path]:
    """The recipes that come with the package: stem to absolute path, sorted."""
    files = sorted((data_root() / "recipes").glob("*.py"))
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def config_files() -> dict[str, Path]:
    """The configs that come with the package: ``<model>/<stem>`` to absolute path, sorted."""
    folder = data_root() / "configs"
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))
    }


def register(registry: ModuleType) -> None:
    """Append our recipes and configs to torchtune's in-memory registry; names that it has already are kept.

    The entries hold absolute paths. ``tune`` joins them to its own folder, which leaves an absolute path as it is, and
    runs registered recipes by path. So they work from any directory and under torchrun, although torchtune's
    wheel owns the importable name ``recipes``.

    Args:
        registry: the module ``torchtune._recipe_registry``.

    Raises:
        ValueError: after everything else is registered, if configs belong to no recipe; names them all.
    """
    recipes = recipe_files()
    configs: dict[str, list[tuple[str, Path]]] = {stem: [] for stem in recipes}
    faults = []
    for name, file in config_files().items():
        try:
            recipe = recipe_of(file.stem)
        except ValueError as error:
            faults.append(str(error))
            continue
        if recipe in configs:
            configs[recipe].append((name, file))
        else:
            faults.append(f"config {name!r} belongs to recipes/{recipe}.py, which does not exist")
    known = {recipe.name for recipe in registry.get_all_recipes()}
    for stem, file in recipes.items():
        if f"recipes/{stem}" in known:
            continue
        registry._ALL_RECIPES.append(
            registry.Recipe(
                name=f"recipes/{stem}",
                file_path=str(file),
                configs=[registry.Config(name=n, file_path=str(f)) for n, f in configs[stem]],
                supports_distributed=True,
            )
        )
    if faults:
        raise ValueError("; ".join(faults))


def find_config(text: str) -> Path:
    """The file of a ``--config`` value.

    Args:
        text: a path against the current directory; or, where no such file exists, one inside the package
            (``configs/tiny/tdpo.yaml``) or the name of a config that ``tune ls`` shows (``tiny/tdpo``).

    Returns:
        An absolute path. If no file fits, it is the path in the current directory, which does not exist.
    """
    here = resolve_path(text)
    if here.is_file() or Path(text).is_absolute() or ".." in Path(text).parts:
        return here
    root = data_root()
    for candidate in (root / text, root / "configs" / text, root / "configs" / f"{text}.yaml"):
        if candidate.is_file():
            return candidate
    return here
