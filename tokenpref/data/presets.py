"""Named layouts of well-known data sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenpref.data.columns import column_of
from tokenpref.errors import ConfigError

__all__ = ["OPTIONAL", "PRESETS", "Preset", "fitting_presets", "preset_named"]

OPTIONAL = ("system", "history", "tools", "input", "margin")
"""Fields of a preset that a data set need not have."""


@dataclass(frozen=True)
class Preset:
    """The layout of a known data set.

    Attributes:
        data: names of the data sets that have this layout.
        format: the ``format`` of :func:`tokenpref.data.preference_dataset`.
        column_map: its ``column_map``.
        labels: its ``labels``.
        as_messages: whether text is read as messages.
        complete: whether answers that are plain text are complete, and therefore end with EOS.
        after_prompt: text that is inserted between a prompt of plain text and its answers.
        telling: whether the names of its columns distinguish the data set from others, so that ``auto`` may suggest the preset.
    """

    data: str
    format: str
    column_map: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Any] | None = None
    as_messages: bool = False
    complete: bool = False
    after_prompt: str = ""
    telling: bool = True

    def columns(self) -> set[str]:
        """The column paths that every row of this layout has."""
        paths = {path for field, path in self.column_map.items() if field not in OPTIONAL}
        return paths | ({self.labels["column"]} if self.labels else set())


def _pku(column: str) -> Preset:
    return Preset(
        "PKU-Alignment/PKU-SafeRLHF",
        "labelled",
        {"prompt": "prompt", "first": "response_0", "second": "response_1"},
        {"column": column, "first": 0, "second": 1},
        as_messages=True,
    )


def _messages(data: str) -> Preset:
    """A layout with lists of messages in ``chosen`` and ``rejected``, which ``auto`` reads as well."""
    return Preset(data, "conversational", {"chosen": "chosen", "rejected": "rejected"}, telling=False)


_TIES = ["tie", "tie (bothbad)", "both_bad", "bothbad"]

PRESETS: dict[str, Preset] = {
    "shp": Preset(
        "stanfordnlp/SHP",
        "labelled",
        {"prompt": "history", "first": "human_ref_A", "second": "human_ref_B", "margin": "score_ratio"},
        {"column": "labels", "first": 1, "second": 0},
        as_messages=True,
    ),
    "pku_better": _pku("better_response_id"),
    "pku_safer": _pku("safer_response_id"),
    "helpsteer3": Preset(
        "nvidia/HelpSteer3 (preference)",
        "labelled",
        {"prompt": "context", "first": "response1", "second": "response2"},
        {"column": "overall_preference", "first": "negative", "second": "positive", "tie": 0},
        as_messages=True,
    ),
    "helpsteer2": Preset(
        "nvidia/HelpSteer2 (preference)",
        "labelled",
        {"prompt": "prompt", "first": "response_1", "second": "response_2"},
        {"column": "preference_strength", "first": "negative", "second": "positive", "tie": 0},
        as_messages=True,
    ),
    "tldr": Preset(
        "openai/summarize_from_feedback (comparisons)",
        "labelled",
        {"prompt": "info.post", "first": "summaries[0].text", "second": "summaries[1].text"},
        {"column": "choice", "first": 0, "second": 1},
        complete=True,
        after_prompt="\n\nTL;DR:",
    ),
    "arena": Preset(
        "lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-140k, lmsys/mt_bench_human_judgments",
        "labelled",
        {"first": "conversation_a", "second": "conversation_b"},
        {"column": "winner", "first": "model_a", "second": "model_b", "tie": _TIES},
    ),
    "ultrafeedback": Preset(
        "openbmb/UltraFeedback",
        "ranked",
        {
            "prompt": "instruction",
            "answers": "completions[].response",
            "score": "completions[].overall_score",
        },
        as_messages=True,
    ),
    "nectar": Preset(
        "berkeley-nest/Nectar",
        "ranked",
        {"prompt": "prompt", "answers": "answers[].answer", "rank": "answers[].rank"},
        complete=True,
    ),
    "hh": Preset("Anthropic/hh-rlhf", "hh", {"chosen": "chosen", "rejected": "rejected"}, telling=False),
    "orca": Preset(
        "Intel/orca_dpo_pairs",
        "conversational",
        {"system": "system", "prompt": "question", "chosen": "chosen", "rejected": "rejected"},
        as_messages=True,
    ),
    "distilabel_orca": Preset(
        "argilla/distilabel-intel-orca-dpo-pairs",
        "conversational",
        {"system": "system", "prompt": "input", "chosen": "chosen", "rejected": "rejected"},
        {"column": "status", "tie": "tie"},
        as_messages=True,
    ),
    "stack_exchange": Preset(
        "lvwerra/stack-exchange-paired",
        "conversational",
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
        as_messages=True,
    ),
    "alpaca": Preset(
        "LLaMA-Factory's preference files (alpaca)",
        "conversational",
        {"prompt": "instruction", "input": "input", "chosen": "chosen", "rejected": "rejected"},
        as_messages=True,
    ),
    "sharegpt": Preset(
        "LLaMA-Factory's preference files (sharegpt)",
        "conversational",
        {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
    ),
    "tulu": _messages("allenai/llama-3.1-tulu-3-8b-preference-mixture and its kin"),
    "skywork": _messages("Skywork/Skywork-Reward-Preference-80K"),
    "capybara": _messages("argilla/distilabel-capybara-dpo-7k-binarized"),
    "dpo_mix": _messages("argilla/dpo-mix-7k, mlabonne/orpo-dpo-mix-40k"),
    "ultrafeedback_binarized": _messages("HuggingFaceH4/ultrafeedback_binarized and its cleaned forms"),
}
"""The layouts by name."""


def preset_named(name: object) -> Preset:
    """Look up a preset.

    Raises:
        ConfigError: if there is no preset of that name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def fitting_presets(available: Collection[str]) -> list[str]:
    """Names of the presets whose columns the data has. Only the names of columns are compared."""
    return [
        name
        for name, preset in PRESETS.items()
        if preset.telling and all(column_of(path, available) for path in preset.columns())
    ]
