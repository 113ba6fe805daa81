"""Start-up hook that makes torchtune's ``tune`` know the recipes and configs of tokenpref.

``tokenpref_tune.pth`` imports this module whenever Python starts, so it takes only what is loaded by then and does
nothing but wait: the first import of ``torchtune._recipe_registry`` (in practice: a ``tune`` command) is followed
by :func:`tokenpref._registry.register`. Whatever goes wrong there is said on stderr and ``tune`` goes on without us.

``TOKENPREF_NO_TUNE_HOOK=1`` switches the hook off.
"""

import os
import sys

# Neither typing nor __future__ is loaded when Python starts; importing them would cost more than all of this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TARGET = "torchtune._recipe_registry"
OFF_SWITCH = "TOKENPREF_NO_TUNE_HOOK"


def _register(registry: "ModuleType") -> None:
    try:
        from tokenpref._registry import register

        register(registry)
    except Exception as error:  # a fault of ours must not take `tune` from the user; it is reported instead
        _say(
            f"tokenpref: recipes or configs are missing from `tune` ({type(error).__name__}: {error}). "
            f"Reinstall or uninstall tokenpref, or set {OFF_SWITCH}=1 to silence this.\n"
        )


def _say(message: str) -> None:
    if sys.stderr is None:
        return
    try:  # noqa: SIM105 - contextlib is not loaded when Python starts
        sys.stderr.write(message)
    except (OSError, ValueError):
        pass  # stderr is closed: there is nobody to tell


class _RegistryFinder:
    """Meta-path finder that answers for the registry module once, and then takes itself out."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The module's ordinary spec, whose loader also registers our recipes; None for every other name."""
        if name != TARGET:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: "ModuleType") -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if not os.environ.get(OFF_SWITCH):
    sys.meta_path.insert(0, _RegistryFinder())
