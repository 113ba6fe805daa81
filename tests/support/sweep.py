"""Odd values for every key of a config: what may happen is a run that nothing stands against, or one clear error."""

from __future__ import annotations

import dataclasses
import inspect
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenpref._registry import find_config
from tokenpref.components import COMPONENT, find_component
from tokenpref.errors import DryRun, TokenprefError
from tokenpref.training import (
    ContrastiveReference,
    Evaluator,
    PreferenceTrainer,
    TripletTrainer,
    WeightedTrainer,
    WeightEstimation,
)
from tokenpref.training.config.keys import BestConfig, EvaluateConfig, SamplingConfig
from tokenpref.training.estimation.estimators import EstimateConfig
from tokenpref.training.estimation.pair_builder import ContrastiveConfig

VALUES: tuple[Any, ...] = (
    None, "", " ", "x", "yes", "no", "true", "1", "1e-3", "null", "auto", "a/b", "~", "~nobody_here", "é" * 200, "x" * 300,
    "a\0b", "\n", "${nowhere}", "???", "folder", "file.json", "package://../..", "torch.optim.SGD", "tokenpref.losses.DPOLoss",
    True, False, 0, 1, -1, 2, 10**6, 2**31, 2**63, 10**30, -(10**30),
    0.0, 0.5, 1.5, -0.5, 1e-300, 1e300, -1e300, math.inf, -math.inf, math.nan,
    [], {}, [1], ["a"], [None], [[]], [{}], ["x" * 300], [0.5, 2], [1e300, -1], {"a": 1}, {"_component_": "x"},
    {"_component_": None}, {"_component_": "tokenpref.losses.DPOLoss"}, {1: 2},
)  # fmt: skip
SAMPLING = {
    "prompts": "package://data/tiny/openings.txt",
    "reward": {COMPONENT: "tokenpref.rewards.KeywordReward", "positive": ["good"], "negative": ["bad"]},
    "num_samples": 1,
    "max_new_tokens": 4,
    "temperature": 1.0,
    "top_k": 5,
    "top_p": 0.9,
    "batch_size": 8,
    "compare_to": None,
}
SCHEDULER = {
    COMPONENT: "torchtune.training.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 1,
    "num_cycles": 0.5,
}
FULL = {
    "sampling": SAMPLING,
    "best": {"metric": "loss", "goal": "min"},
    "lr_scheduler": SCHEDULER,
    "profiler.enabled": True,
}
PROMPTS = {
    COMPONENT: "tokenpref.training.OnlinePrompts",
    "positive_prompt": "good ",
    "negative_prompt": "bad ",
}
COLUMNS = {COMPONENT: "tokenpref.data.ColumnScores", "kind": "weight"}

TINY = "package://data/tiny/model"
CAUSAL_LM = {
    "model": {
        COMPONENT: "tokenpref.models.causal_lm",
        "path": TINY,
        "lora": {
            "rank": 2,
            "alpha": 4,
            "dropout": 0.0,
            "target_modules": ["q_proj"],
            "use_dora": False,
            "quantize_base": False,
        },
    },
    "checkpointer": {
        COMPONENT: "tokenpref.models.CausalLMCheckpointer",
        "checkpoint_dir": TINY,
        "output_dir": "out",
        "checkpoint_files": ["model.safetensors"],
    },
    "tokenizer.chat_template_kwargs": {},
}

# Name: recipe's class, config, what is changed in it.
SETUPS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "tdpo": (PreferenceTrainer, "tiny/tdpo", FULL),
    "dpo": (PreferenceTrainer, "tiny/dpo", {}),
    "dpo_cached": (
        PreferenceTrainer,
        "tiny/dpo",
        {"reference": "cached", "loss_val": {COMPONENT: "tokenpref.losses.DPOLoss"}},
    ),
    "tis_dpo": (WeightedTrainer, "tiny/tis_dpo", {"token_weights.path": "store"}),
    "tis_dpo_online": (WeightedTrainer, "tiny/tis_dpo", {"token_weights": PROMPTS}),
    "ti_dpo": (TripletTrainer, "tiny/ti_dpo", {}),
    "contrastive_reference": (ContrastiveReference, "tiny/contrastive_reference", {}),
    "estimate_weights": (WeightEstimation, "tiny/estimate_weights", {"estimator.pair": "pair"}),
    "estimate_weights_attribution": (WeightEstimation, "tiny/estimate_weights_attribution", {}),
    "causal_lm": (PreferenceTrainer, "tiny/dpo", CAUSAL_LM),
    "evaluate": (Evaluator, "tiny/evaluate", {}),
}
SCHEMAS = {
    ContrastiveReference: ContrastiveConfig,
    WeightEstimation: EstimateConfig,
    Evaluator: EvaluateConfig,
}
SECTIONS = {"sampling": SamplingConfig, "best": BestConfig}
# Would start a real run.
GOES_ON = {"dry_run": (None, False)}


def config_of(name: str) -> dict[str, Any]:
    """A setup's config as plain data, interpolations unresolved."""
    _, preset, changes = SETUPS[name]
    cfg = OmegaConf.load(find_config(preset))
    for key, value in {**changes, "output_dir": "out", "dry_run": True, "dataset.max_rows": 8}.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    plain: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    return plain


def keys_of(name: str) -> list[tuple[str, ...]]:
    """Every key of a setup: those that its config holds, that its schema knows, and that its components' signatures take."""
    recipe = SETUPS[name][0]
    schema = SCHEMAS.get(recipe) or recipe.schema
    found = dict.fromkeys(_walk(config_of(name)))
    found |= dict.fromkeys((field.name,) for field in dataclasses.fields(schema))
    return list(found)


def _walk(node: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(node, Mapping):
        return
    names = list(node)
    if COMPONENT in node:
        parameters = inspect.signature(find_component(node[COMPONENT])).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    elif prefix and prefix[-1] in SECTIONS:
        names += [field.name for field in dataclasses.fields(SECTIONS[prefix[-1]])]
    for name in dict.fromkeys(names):
        yield (*prefix, name)
        yield from _walk(node.get(name), (*prefix, name))


def new_keys() -> dict[str, list[tuple[str, ...]]]:
    """Keys of each setup that no setup before it has read in the same way: under the same component, or at all."""
    seen: set[tuple[Any, ...]] = set()
    found: dict[str, list[tuple[str, ...]]] = {}
    for name in SETUPS:
        data, found[name] = config_of(name), []
        for key in keys_of(name):
            node = data
            for part in key[:-1]:
                node = node[part]
            mark = (key, node.get(COMPONENT) if len(key) > 1 else None)
            if mark not in seen:
                seen.add(mark)
                found[name].append(key)
    return found


def cases_of(name: str, keys: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...], Any]]:
    """Keys of a setup with all values."""
    return [
        (key, value)
        for key in keys
        for value in VALUES
        if not any(value is one for one in GOES_ON.get(key[0], ()))
    ]


def outcome(name: str, key: tuple[str, ...], value: Any) -> str:
    """What comes of a value: "accepted", "refused: MESSAGE", or the traceback of anything else."""
    data = config_of(name)
    node = data
    for part in key[:-1]:
        node = node[part]
    node[key[-1]] = value
    run = None
    try:
        try:
            cfg = OmegaConf.create(data)
        except (OmegaConfBaseException, ValueError):
            return "refused: no config holds it"
        run = SETUPS[name][0](cfg)
        run.setup() if hasattr(run, "setup") else run.run()
    except DryRun:
        return "accepted"
    except TokenprefError as error:
        return f"refused: {error}"
    except Exception:
        return traceback.format_exc()
    finally:
        if run is not None:
            run.close()
    return "it went on"


def everything(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def remove_new(folder: Path, before: Iterable[str]) -> None:
    """Remove what was not in a folder before."""
    for name in sorted(set(everything(folder)) - set(before), reverse=True):  # a folder after what lies in it
        path = folder / name
        path.rmdir() if path.is_dir() else path.unlink()
