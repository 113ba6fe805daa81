"""Write docs/configs.md, the reference of all keys of the recipes' configs, from the code.

    python scripts/make_config_reference.py [--output docs/configs.md]

Keys, what they take and their defaults come from the dataclasses of the configs, and their meaning from the text under each
field. Arguments of components come from signatures and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenpref.components import Argument, arguments_of, find_component
from tokenpref.training.config.compute import ComputeConfig
from tokenpref.training.config.keys import (
    BestConfig,
    EvaluateConfig,
    ModelConfig,
    SamplingConfig,
    ScoringConfig,
    TrainConfig,
    TripletConfig,
    WeightedConfig,
    default_profiler,
)
from tokenpref.training.estimation.estimators import EstimateConfig
from tokenpref.training.estimation.pair_builder import ContrastiveConfig

OUTPUT = Path(__file__).parents[1] / "docs" / "configs.md"

INTRODUCTION = """\
# Keys of the configs

<!-- Written by scripts/make_config_reference.py from the code. Change the code, and run it again. -->

This page lists every key that a config may have, with its default. The shipped configs name what defines their method and leave
out other keys at their default. Any key may be set on the command line, whether or not the file names it:

```
tune run recipes/tdpo_distributed --config tiny/tdpo keep_last=3 loss.beta=0.2 profiler.enabled=true
```

- A key with the default *required* must be in the file or on the command line. `null` means the same as leaving the key out.
- A component is a mapping with `_component_`, the dotted path of a class or function, and its arguments. On the command line
  `key=path` is short for `key._component_=path`. [The second part](#components) lists the arguments of the components in this
  package. Your own classes and functions may stand in their place.
- An unknown key is an error, unless another key refers to it as `${key}`.
"""

# Recipe by recipe: the dataclass of its keys, and the sections of this page that hold the keys it shares with others.
SECTIONS: list[tuple[str, str, list[type]]] = [
    ("All recipes", "", [ScoringConfig]),
    (
        "Recipes with a policy and a reference",
        "These are the keys of the four training recipes and of `recipes/evaluate_distributed`.",
        [ModelConfig],
    ),
    (
        "Training recipes",
        "These are the further keys of `recipes/tdpo_distributed`, `recipes/tis_dpo_distributed`, "
        "`recipes/ti_dpo_distributed` and `recipes/contrastive_reference_distributed`.",
        [TrainConfig],
    ),
    ("Precision and memory of training", "The four training recipes have these keys too.", [ComputeConfig]),
    ("`recipes/tis_dpo_distributed` and `recipes/ti_dpo_distributed`", "", [WeightedConfig]),
    ("`recipes/ti_dpo_distributed`", "", [TripletConfig]),
    ("`recipes/contrastive_reference_distributed`", "", [ContrastiveConfig]),
    (
        "`recipes/estimate_weights_distributed`",
        "It also has the keys of [all recipes](#all-recipes).",
        [EstimateConfig],
    ),
    ("`recipes/evaluate_distributed`", "", [EvaluateConfig]),
    (
        "The section `sampling`",
        "Training recipes and evaluation have it. It is off unless the config names it.",
        [SamplingConfig],
    ),
    ("The section `best`", "Training recipes have it. It is off unless the config names it.", [BestConfig]),
]

# Dotted paths by the key that they are meant for, with the arguments that the recipe passes.
COMPONENTS: list[tuple[str, tuple[str, ...], list[str]]] = [
    ("`dataset`, `dataset_val`", ("tokenizer",), ["tokenpref.data.preference_dataset"]),
    ("`tokenizer`", (), ["tokenpref.data.tokenizer_json"]),
    (
        "`model`",
        (),
        [
            f"tokenpref.models.{name}"
            for name in ("causal_lm", "tiny_llama", "smollm2_135m", "lora_tiny_llama", "lora_smollm2_135m")
        ],
    ),
    ("`checkpointer`, `ref_checkpointer`", (), ["tokenpref.models.CausalLMCheckpointer"]),
    (
        "`loss`, `loss_val`",
        (),
        [
            f"tokenpref.losses.{name}"
            for name in ("DPOLoss", "TokenDPOLoss", "TISDPOLoss", "TripletTIDPOLoss", "NLLLoss")
        ],
    ),
    (
        "`token_weights`",
        (),
        [
            "tokenpref.data.StoredScores",
            "tokenpref.data.ColumnScores",
            "tokenpref.training.OnlinePrompts",
            "tokenpref.training.OnlinePair",
            "tokenpref.training.Attribution",
        ],
    ),
    (
        "`weight_transform`",
        ("log_ratio", "mask", "side", "keys"),
        [
            f"tokenpref.weights.transforms.{name}"
            for name in (
                *("exponential", "rank_based", "threshold", "threshold_and_scale", "binary", "uniform"),
                "random",
            )
        ],
    ),
    ("`anchors`", (), ["tokenpref.training.AnchorSampler", "tokenpref.data.ColumnAnchors"]),
    (
        "`estimator`",
        (),
        ["tokenpref.training.ContrastiveEstimator", "tokenpref.training.AttributionEstimator"],
    ),
    (
        "`target` and `prior` of attribution",
        (),
        [
            f"tokenpref.weights.attribution.{name}"
            for name in ("MaxLogit", "AnswerLogp", "PreferenceMargin", "GaussianPrior")
        ],
    ),
    (
        "`lr_scheduler`",
        ("optimizer", "num_training_steps", "last_epoch"),
        ["tokenpref.training.get_constant_schedule_with_warmup"],
    ),
    ("`sampling.reward`", (), ["tokenpref.rewards.VaderReward", "tokenpref.rewards.KeywordReward"]),
]


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, about, schemas in SECTIONS:
        parts.append(f"## {title}\n" + (f"\n{about}\n" if about else ""))
        parts += [_table("key", _keys(schema)) for schema in schemas]
        if TrainConfig in schemas:
            parts.append(
                f"The default of `profiler`, of which a config may change single arguments:\n\n{_profiler()}"
            )
    parts.append("## Components\n")
    for title, passed, paths in COMPONENTS:
        parts.append(f"### {title}\n")
        for path in paths:
            parts += _component(path, passed)
    return "\n".join(parts).rstrip() + "\n"


def _keys(schema: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, kind, default and meaning of the keys that a class adds to those it inherits, or narrows."""
    meanings = _field_texts(schema)
    own = inspect.get_annotations(schema)
    for field in dataclasses.fields(schema):
        if field.name in own:
            default = "*required*" if field.default is dataclasses.MISSING else _shown(field.default)
            if field.metadata.get("base") is not None:
                default = "torch's profiler, off"
            yield field.name, field.metadata["kind"], default, meanings[field.name]


def _field_texts(schema: type) -> dict[str, str]:
    """The text under each field of a dataclass.

    Raises:
        ValueError: for a field without one.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
                raise ValueError(f"{schema.__name__}.{node.target.id}: has no text that says what it means")
            texts[node.target.id] = _plain(text.value)
    return texts


def _component(path: str, passed: tuple[str, ...]) -> list[str]:
    target = find_component(path)
    documented = inspect.getdoc(target) or ""
    meanings = _argument_texts(documented)
    arguments = [argument for argument in arguments_of(target, passed) if argument.name in meanings]
    summary = _plain(documented.partition("\n\n")[0])
    rows = (
        (a.name, a.takes.replace(" (a mapping with _component_)", ""), _argument_default(a), meanings[a.name])
        for a in arguments
    )
    table = _table("argument", rows) if arguments else "It takes no arguments.\n"
    return [f"#### `{path}`\n\n{summary}\n", table]


def _argument_texts(documented: str) -> dict[str, str]:
    """The section ``Args`` of a docstring: name to text."""
    found = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", documented, re.MULTILINE)
    if found is None:
        return {}
    entries = re.split(r"^(\w+): ", textwrap.dedent(found[1]), flags=re.MULTILINE)
    return {name: _meaning(text) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


def _argument_default(argument: Argument) -> str:
    return "*required*" if argument.default is inspect.Parameter.empty else _shown(argument.default)


def _profiler() -> str:
    rows = default_profiler({"output_dir": "${output_dir}", "device": "cpu"})
    lines = ["```yaml", "profiler:"]
    for name, value in rows.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        lines.append(f"  {name}: {shown}{'  # true where device is cuda' if name == 'cuda' else ''}")
    return "\n".join([*lines, "```"]) + "\n"


def _table(first: str, rows: Iterable[tuple[str, str, str, str]]) -> str:
    lines = [f"| {first} | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for name, takes, default, meaning in rows:
        cells = (f"`{name}`", takes, default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _plain(text: str) -> str:
    """A text of the code on one line, with code marked as Markdown does."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")


def _meaning(text: str) -> str:
    """What a docstring says of an argument, in a config's words and as a sentence."""
    text = _plain(text)
    for python, in_yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"(?<![.] )\b{python}\b", in_yaml, text).replace(python, in_yaml.capitalize())
    return text[:1].upper() + text[1:]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="the file to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.output.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
