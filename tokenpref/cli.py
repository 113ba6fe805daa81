"""The ``tokenpref`` command, for everything that is not a recipe. Recipes run through ``tune run``."""

from __future__ import annotations

import argparse
import math
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
    "peft",
    "gguf",
    "vaderSentiment",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        Exit code: 0, or 2 after an error that the user can fix, which is printed in one line.
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

    show = verbs.add_parser(
        "show-weights",
        help="print rows of a weight store, with tokens coloured by their scores",
        description="Print the answers of single rows of a weight store, with tokens coloured by their scores: blue "
        "where the score is positive (pi+ prefers the token, if scores are log pi+ - log pi-), orange where it is "
        "negative. Without colour each token is followed by its score.",
    )
    show.add_argument("store", type=Path, metavar="STORE", help="folder of the weight store")
    show.add_argument(
        "--row",
        type=int,
        action="append",
        metavar="N",
        help="row of the data's source; may be given several times (default: the first of the store)",
    )
    show.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write a self-contained HTML page instead"
    )
    show.add_argument(
        "--limit",
        type=_positive_number,
        metavar="X",
        help="absolute score at which colours saturate (default: the row's 95th percentile)",
    )
    show.add_argument("--top", type=_count, default=0, metavar="K", help="list the K largest absolute scores")
    show.add_argument("--full", action="store_true", help="show the whole prompt and not only its end")
    show.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal, unless NO_COLOR is set (default: %(default)s)",
    )
    show.add_argument(
        "--background",
        choices=("auto", "dark", "light"),
        default="auto",
        help="what the colours are made for; auto: what COLORFGBG says, else dark (default: %(default)s)",
    )
    show.set_defaults(run=_show_weights)

    merge = verbs.add_parser(
        "merge",
        help="merge an adapter into the weights of its base",
        description="Write the weights of an adapter's base with the adapter merged in: a model that needs no adapter any more, "
        "with the base's config, names and dtypes. Folders of this package and of peft are read, LoRA and DoRA.",
    )
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter, such as epoch_0")
    merge.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder to write, which must not exist",
    )
    merge.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="folder of the base (default: the one that the adapter names)",
    )
    merge.set_defaults(run=_merge)

    env = verbs.add_parser("env", help="print versions and hardware, for a bug report")
    env.set_defaults(run=_print_environment)
    return parser


def _prepare_smollm2(arguments: argparse.Namespace) -> None:
    from tokenpref.models.smollm2 import prepare

    prepare(arguments.output)
    print(f"SmolLM2-135M-Instruct is in {arguments.output}")


def _merge(arguments: argparse.Namespace) -> None:
    from tokenpref.models.merging import merge_adapter

    base = merge_adapter(arguments.adapter, arguments.output, arguments.base)
    print(f"{arguments.adapter} merged into {base} is in {arguments.output}")


def _positive_number(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, found {text}")
    return value


def _show_weights(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output is not None and not output.parent.is_dir():
        raise TokenprefError(
            f"{output}: the folder {output.parent} does not exist; create it, or set another --output"
        )

    from tokenpref.data import WeightStore
    from tokenpref.insight import html_page, terminal_text

    store = WeightStore.open(arguments.store)
    if len(store) == 0:
        raise TokenprefError(
            f"{arguments.store}: the store has no rows; estimate weights for data that has rows"
        )
    rows = [store.row(n) for n in dict.fromkeys(arguments.row)] if arguments.row else [next(iter(store))]
    limit, full, top = arguments.limit, arguments.full, arguments.top
    if output is None:
        color, light = _wants_color(arguments.color), _is_light(arguments.background)
        _print_shown(
            terminal_text(rows, store.metadata, color=color, light=light, limit=limit, full=full, top=top)
        )
        return
    page = html_page(rows, store.metadata, limit=limit, full=full, top=top)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise TokenprefError(
            f"{output}: the page cannot be written ({error.strerror}); set another --output"
        ) from error
    print(f"{len(rows)} row{'' if len(rows) == 1 else 's'} of {arguments.store} in {output}")


def _wants_color(choice: str) -> bool:
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _is_light(choice: str) -> bool:
    """Some terminals set COLORFGBG to "foreground;background"; 7 and 15 are the two whites."""
    if choice != "auto":
        return choice == "light"
    return os.environ.get("COLORFGBG", "").rpartition(";")[2] in {"7", "15"}


def _print_shown(text: str) -> None:
    """Print the text, with escapes for characters that the output's encoding lacks (a log may be ASCII)."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="")


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
