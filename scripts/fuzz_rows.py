"""Feed valid and broken rows of every layout to the row reader, and count the outcomes.

    python scripts/fuzz_rows.py --minutes 5 --seed 0

Every row must become pairs, be left out as a tie, or be reported as a fault. Any exception from outside this package is a
bug. The script then prints it with the file and the settings that raised it, and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import re
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import datasets

from tokenpref.data import preference_dataset, tokenizer_json
from tokenpref.data.presets import PRESETS
from tokenpref.errors import TokenprefError

USER = {"role": "user", "content": "2+2?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIR = {"chosen": [USER, said("4")], "rejected": [USER, said("5")]}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": None}}}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]
# Valid rows; presets are tried on all of them.
ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5", "complete": True},
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5", "label": "tie", "margin": 0},
    {"chosen": "Q: 2+2?\nA: 4", "rejected": "Q: 2+2?\nA: 5"},
    {"chosen": "प्रश्न: नाम? कीर्ति", "rejected": "प्रश्न: नाम? काशी"},
    {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    PAIR,
    {
        "prompt": [USER],
        "chosen": said("4"),
        "rejected": said("5"),
        "system": "Be brief.",
        "history": [["1+1?", "2"]],
    },
    {
        "prompt": [USER, CALL, {"role": "tool", "content": "4"}],
        "chosen": [said("4")],
        "rejected": [CALL],
        "tools": TOOLS,
    },
    {key: json.dumps(value) for key, value in PAIR.items()},
    {"prompt": {"role": ["user"], "content": ["2+2?"]}, "chosen": "4", "rejected": "5"},
    {
        "instruction": "Add.",
        "input": "2+2?",
        "chosen": "4",
        "rejected": "5",
        "system": "Be brief.",
        "history": [["1+1?", "2"]],
    },
    {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    {"history": "2+2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1, "score_ratio": 3.0},
    {"prompt": "2+2?", "response_0": "5", "response_1": "4", "better_response_id": 1, "safer_response_id": 0},
    {"context": [USER], "response1": "4", "response2": "5", "overall_preference": -2},
    {"prompt": "2+2?", "response_1": "5", "response_2": "4", "preference_strength": 1},
    {"info": {"post": "2+2?"}, "summaries": [{"text": " 5"}, {"text": " 4"}], "choice": 1},
    {"conversation_a": PAIR["chosen"], "conversation_b": PAIR["rejected"], "winner": "tie (bothbad)"},
    {"conversation_a": PAIR["chosen"], "conversation_b": PAIR["rejected"], "winner": "model_b"},
    {
        "instruction": "2+2?",
        "completions": [{"response": "4", "overall_score": 9.0}, {"response": "5", "overall_score": 1}],
    },
    {"instruction": "2+2?", "completions": {"response": ["4", "5", "6"], "overall_score": ["9", "1", "N/A"]}},
    {
        "prompt": "Human: 2+2?",
        "answers": [{"answer": "4", "rank": 1.0}, {"answer": "5", "rank": 2.0}, {"answer": "6", "rank": 2.0}],
    },
    {"system": "", "question": "2+2?", "chosen": "4", "rejected": "5"},
    {"system": "", "input": "2+2?", "chosen": "4", "rejected": "5", "status": "tie"},
    {"question": "2+2?", "response_j": "4", "response_k": "5"},
    {"first": "4", "second": "5", "prompt": "2+2?", "label": 2},
    {"prompt": "2+2?", "answers": ["4", "5"], "score": [1, 2]},
]
JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**70,
        -(2**70),
        1e300,
        0.5,
        "",
        " ",
        "\n",
        "\ud83d",
        "\u0301",
        "\u200d",
        "🇩🇪",
        "x" * 300,
    ),
    *(
        "[",
        "[]",
        "{}",
        "null",
        "1",
        "NaN",
        "tie",
        "[{",
        '[{"role": "user"',
        "[{'role': 'user', 'content': 'x'}]",
        "[" * 2000,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        {"a": 1},
        [1, "a", None],
        [["a"]],
        [["a", None]],
        {"role": "user"},
        {"role": ["user"]},
        USER,
    ),
    *(
        {"role": None, "content": None},
        {"role": ["user"], "content": ["a", "b"]},
        {"from": 1, "value": 2},
        {"from": "x", "value": "y"},
    ),
    *(
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        [USER],
        [said("a")],
    ),
    *(
        [CALL],
        TOOLS,
        json.dumps([USER]),
        json.dumps(TOOLS),
        json.dumps(USER),
        {"role": "tool", "content": {"a": None}},
    ),
]
NAMES = sorted(
    {name for row in ROWS for name in row} | {"images", "chosen_reasoning", "verdict", "rank", "a.b", "x[0]"}
)
PATHS = [
    *NAMES,
    "info.post",
    "summaries[0].text",
    "summaries[].text",
    "completions[].response",
    "a.",
    "[",
    "answers[].rank",
    "x[0]",
]
FIELDS = [
    "prompt",
    "chosen",
    "rejected",
    "first",
    "second",
    "answers",
    "score",
    "rank",
    "system",
    "history",
    "tools",
    "input",
    "margin",
    "complete",
    "chosen_complete",
    "other",
]
FORMATS = ("auto", "explicit", "implicit", "conversational", "hh", "labelled", "ranked")
WORDS = {"label": [1, 2, 0, "a", "tie", True, "negative", "positive", None, [1, "1"], [], {}, float("nan")]}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def spoilt(draw: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """A row with one change, removal or insertion."""
    row = copy.deepcopy(row)
    *head, last = draw.choice([place for place in places(row) if place] or [("prompt",)])
    holder: Any = row
    for key in head:
        holder = holder[key]
    kind = draw.randrange(6)
    if kind == 0 and head == [] and len(row) > 1:
        del row[last]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(last, draw.choice(JUNK))
    elif kind == 2:
        holder[last] = json.dumps(holder[last])
    elif kind == 3:
        holder[last] = draw.choice(([holder[last]], {"a": holder[last]}, [holder[last]] * 3))
    elif kind == 4:
        row[draw.choice(NAMES)] = draw.choice(JUNK)
    else:
        holder[last] = copy.deepcopy(draw.choice(JUNK))
    return row


def file_of_rows(draw: random.Random, good: dict[str, Any]) -> list[dict[str, Any]]:
    """Variants of a valid row, most of them broken."""
    rows = []
    for _ in range(draw.choice((1, 5, 20, 60))):
        row = draw.choice(ROWS) if draw.random() < 0.05 else good
        for _ in range(draw.choice((0, 0, 1, 1, 2, 4))):
            row = spoilt(draw, row)
        rows.append(row)
    return rows


def settings(draw: random.Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {"on_fault": draw.choice(("error", "drop", "drop"))}
    if draw.random() < 0.4:
        chosen["preset"] = draw.choice(list(PRESETS))
    elif draw.random() < 0.7:
        chosen["format"] = draw.choice(FORMATS)
    if chosen.get("format") == "labelled":
        chosen["labels"] = {"column": draw.choice(PATHS), "first": 1, "second": 2, "tie": 0}
    if chosen.get("format") == "ranked":
        chosen["column_map"] = {
            "answers": draw.choice(PATHS),
            draw.choice(("score", "rank")): draw.choice(PATHS),
        }
    if draw.random() < 0.3:
        mapped = {draw.choice(FIELDS): draw.choice([*PATHS, None]) for _ in range(draw.randint(1, 3))}
        chosen["column_map"] = {**chosen.get("column_map", {}), **mapped}
    if draw.random() < 0.15:
        keys = draw.sample(("column", "first", "second", "tie", "other"), draw.randint(0, 4))
        chosen["labels"] = {key: draw.choice(NAMES if key == "column" else WORDS["label"]) for key in keys}
    if draw.random() < 0.3:
        chosen |= {
            "pairs": draw.choice(("all", "adjacent", "best_worst", "some")),
            "min_gap": draw.choice((0, 1, 2.5, -1)),
        }
    if draw.random() < 0.3:
        chosen["as_messages"] = draw.choice((True, False, "auto", "yes"))
    return chosen | {"swap": draw.random() < 0.2}


def fitting(draw: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """Settings that should read a valid row, judged by its columns."""
    if {"first", "second"} <= set(row):
        chosen: dict[str, Any] = {
            "format": "labelled",
            "labels": {"column": "label", "first": 1, "second": 2, "tie": [0, "tie"]},
        }
    elif "score" in row:
        chosen = {"format": "ranked"}
    else:
        names = [
            name
            for name, preset in PRESETS.items()
            if all(re.split(r"[.\[]", path)[0] in row for path in preset.columns())
            and (preset.telling or draw.random() < 0.3)
        ]
        chosen = {"preset": draw.choice(names)} if names else {}
    if chosen.get("format") == "ranked" or {"completions", "answers"} & set(row):
        chosen["pairs"] = draw.choice(("all", "adjacent", "best_worst"))
    return {**chosen, "on_fault": "drop", "swap": draw.random() < 0.2}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to try (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the first file (default 0)")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = tokenizer_json("package://data/tiny/model")
    counts: collections.Counter[str] = collections.Counter()
    end, seed = time.monotonic() + 60 * arguments.minutes, arguments.seed
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        while time.monotonic() < end:
            counts.update(one_file(Path(folder) / "rows.jsonl", tokenizer, seed))
            seed += 1
    for name in ("files", "rows", "pairs", "left out", "files refused", "foreign exceptions"):
        print(f"{name}: {counts[name]:,}")
    return int(counts["foreign exceptions"] > 0)


def one_file(path: Path, tokenizer: Any, seed: int) -> dict[str, int]:
    """The outcome of one file."""
    draw = random.Random(seed)
    good = draw.choice(ROWS)
    rows = file_of_rows(draw, good)
    chosen = fitting(draw, good) if draw.random() < 0.75 else settings(draw)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    counts = {"files": 1, "rows": len(rows)}
    try:
        data = preference_dataset(tokenizer, str(path), add_bos=False, **chosen)
        for index in range(len(data)):
            data.text(index), data.margin(index), data.locate(index)
        return counts | {"pairs": len(data), "left out": sum(data.report.dropped.values())}
    except TokenprefError:
        return counts | {"files refused": 1}
    except Exception:
        print(f"seed {seed}, {chosen}\n{path.read_text(encoding='utf-8')}\n{traceback.format_exc()}")
        return counts | {"foreign exceptions": 1}


if __name__ == "__main__":
    raise SystemExit(main())
