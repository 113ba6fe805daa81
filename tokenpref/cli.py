"""The ``tokenpref`` command: what is not a recipe. Recipes run through ``tune run``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tokenpref import __version__
from tokenpref._paths import data_root
from tokenpref.errors import USER_ERROR_EXIT, TokenprefError

__all__ = ["main"]

_REPORTED = (
    "torch",
    "torchtune",
    "torchao",
    "torchdata",
    "datasets",
    "pyarrow",
    "tokenizers",
    "omegaconf",
    "numpy",
    "huggingface_hub",
    "transformers",
    "gguf",
    "vaderSentiment",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        Exit code: 0, or 2 after an error that the user can mend, which is printed in one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except TokenprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenpref",
        description="Token-level preference optimisation for torchtune. Training runs through torchtune's command: "
        "`tune ls` shows the recipes, `tune run recipes/tdpo_distributed --config tiny/tdpo` runs one.",
    )
    parser.add_argument("--version", action="version", version=f"tokenpref {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    prepare = verbs.add_parser("prepare", help="write a built-in model as a checkpoint folder")
    models = prepare.add_subparsers(title="models", metavar="MODEL", required=True)
    smollm2 = models.add_parser("smollm2", help="SmolLM2-135M-Instruct")
    smollm2.add_argument(
        "--output",
        type=Path,
        default=Path("models/smollm2-135m-instruct"),
        help="folder to write (default: %(default)s, where the smollm2/* configs look)",
    )
    smollm2.set_defaults(run=_prepare_smollm2)

    env = verbs.add_parser("env", help="print versions and hardware, for a bug report")
    env.set_defaults(run=_print_environment)
    return parser


def _prepare_smollm2(arguments: argparse.Namespace) -> None:
    from tokenpref.models.smollm2 import prepare

    prepare(arguments.output)
    print(f"SmolLM2-135M-Instruct is in {arguments.output}")


def _print_environment(arguments: argparse.Namespace) -> None:
    rows = {
        "tokenpref": f"{__version__} ({data_root()})",
        "tune hook": _hook_state(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
        **{name: _version(name) for name in _REPORTED},
        "devices": _devices(),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _hook_state() -> str:
    hook = sys.modules.get("_tokenpref_tune")
    if hook is None:
        return "not installed: `tune` does not know our recipes; install tokenpref with pip into this environment"
    if os.environ.get(hook.OFF_SWITCH):
        return f"switched off by {hook.OFF_SWITCH}"
    return f"active ({hook.__file__})"


def _devices() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"unknown: torch cannot be imported ({error})"
    if not torch.cuda.is_available():
        return "cpu only"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


if __name__ == "__main__":
    sys.exit(main())
