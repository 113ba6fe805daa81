"""Make preference pairs from samples of a model and their rewards, as ``data/sentiment`` was made, for any model and reward.

In each group of samples of one opening, the best and the worst become chosen and rejected if their rewards differ
enough. By default this needs the prepared model and vaderSentiment (``pip install "tokenpref[smollm2]"``).

python scripts/make_sentiment_pairs.py --openings my_openings.txt --output pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenpref._paths import resolve_path
from tokenpref.components import find_component, signature_faults
from tokenpref.data import Tokenizer, tokenizer_json
from tokenpref.distributed import World, single_process_world
from tokenpref.errors import ConfigError, DataError, TokenprefError
from tokenpref.models.generation import sample
from tokenpref.rewards import Reward, ValenceReward, checked_rewards
from tokenpref.training.config.fields import Component
from tokenpref.training.loading.models import check_state_fits, read_weights


@dataclass(frozen=True)
class Sample:
    """A continuation of an opening, with its reward.

    Args:
        text: without the end-of-text token.
        reward: the reward of the text.
        ended: whether the model ended it; False if it reached the limit.
    """

    text: str
    reward: float
    ended: bool


def named(path: str, option: str) -> Any:
    """The object at a dotted path, also in modules of the current directory.

    Raises:
        ConfigError: if there is no such object.
    """
    try:
        return find_component(path)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error


def load_reward(path: str, settings: dict[str, Any]) -> Reward:
    """An instance of a class, or a function with its keywords.

    Raises:
        ConfigError: if there is no such reward, or it refuses its settings.
    """
    component = Component("--reward", path, settings)
    faults = signature_faults(
        target := named(path, "--reward"), settings, (), 0 if isinstance(target, type) else 2
    )
    if faults:
        raise ConfigError([f"--reward-args.{fault}" for fault in faults])
    return component.callable()


def load_model(component: str, folder: Path, model_type: str, world: World) -> nn.Module:
    """A model named by dotted path, with the weights of an HF checkpoint folder.

    Raises:
        ConfigError: if there is no such model, or the weights are missing or another model's.
    """
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    builder = named(component, "--model")
    if not files:
        prepare = getattr(builder, "prepare_command", None)
        hint = f"run `{prepare}`" if prepare else "name a Hugging Face checkpoint folder"
        raise ConfigError(f"--checkpoint: no *.safetensors in {folder}; {hint}")
    with tempfile.TemporaryDirectory() as unused:
        checkpointer = Component(
            "--checkpoint",
            "torchtune.training.FullModelHFCheckpointer",
            {
                "checkpoint_dir": str(folder),
                "checkpoint_files": files,
                "model_type": model_type,
                "output_dir": unused,
            },
        ).build()
        state = read_weights(checkpointer, "--checkpoint", world)
    model: Any = builder()
    check_state_fits(state, model, "--checkpoint")
    model.load_state_dict(state)
    return model.to(world.device)


def sample_groups(
    model: Any,
    tokenizer: Tokenizer,
    reward: Reward,
    openings: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    world: World,
) -> list[list[Sample]]:
    """``samples`` scored continuations of each opening. The noise depends on seed, opening and number only.

    Raises:
        DataError: if an opening has no token.
        ConfigError: if a number is out of range, or the reward returns something else than a number for each text.
    """
    ids = [tokenizer.encode_with_offsets(opening)[0] for opening in openings]
    if empty := [opening for opening, tokens in zip(openings, ids, strict=True) if not tokens]:
        raise DataError(f"--openings: {empty[0]!r} has no token")
    jobs = [(row, number) for row in range(len(openings)) for number in range(samples)]
    try:
        outputs = sample(
            model,
            [ids[row] for row, _ in jobs],
            seeds=[(seed * 1_000_003 + row) * 1_000_003 + number for row, number in jobs],
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            temperature=temperature,
            batch_size=batch_size,
            world=world,
        )
    except ValueError as error:
        raise ConfigError(f"--openings, --max-new-tokens, --temperature, --batch-size: {error}") from error
    ended = [output[-1] == tokenizer.eos_id for output in outputs]
    texts = [
        tokenizer.decode(output[:-1] if end else output) for output, end in zip(outputs, ended, strict=True)
    ]
    values = checked_rewards(reward, [openings[row] for row, _ in jobs], texts, "--reward")
    scored = [Sample(text, value, end) for text, value, end in zip(texts, values, ended, strict=True)]
    return [scored[start : start + samples] for start in range(0, len(scored), samples)]


def pairs_of(
    opening: str,
    samples: Sequence[Sample],
    *,
    group: int,
    min_gap: float,
    reward: Reward,
    drop: frozenset[str] = frozenset(),
) -> list[dict[str, Any]]:
    """Rows from the best and the worst sample of each complete group of samples of one opening.

    Args:
        opening: the prompt.
        samples: its samples.
        group: samples that compete for one pair.
        min_gap: smallest difference in reward, above 0.
        reward: marks the words that count, if it has ``valence``.
        drop: lower-case words that no pair may contain.

    Returns:
        Rows with the fields of ``data/sentiment``: texts, rewards and, from a reward that has them, valences; and
        ``chosen_complete``, ``rejected_complete``, which tell ``append_eos: auto`` the answers with an end.
        Among equal samples the first one is taken. A pair with an empty answer is left out.
    """
    rows = []
    for start in range(0, len(samples) - group + 1, group):
        competing = samples[start : start + group]
        best, worst = max(competing, key=lambda s: s.reward), min(competing, key=lambda s: s.reward)
        words = f"{best.text} {worst.text}".lower().split()
        if (
            best.reward - worst.reward < min_gap
            or not best.text.strip()
            or not worst.text.strip()
            or not drop.isdisjoint(word.strip(".,;:!?\"'()") for word in words)
        ):
            continue
        row: dict[str, Any] = {"prompt": opening, "chosen": best.text, "rejected": worst.text}
        row |= {"chosen_reward": best.reward, "rejected_reward": worst.reward}
        row |= {"chosen_complete": best.ended, "rejected_complete": worst.ended}
        if isinstance(reward, ValenceReward):
            row |= {
                "chosen_valence": reward.valence(best.text),
                "rejected_valence": reward.valence(worst.text),
            }
        rows.append(row)
    return rows


def lines_of(path: Path, option: str) -> list[str]:
    """The non-empty lines of a file.

    Raises:
        DataError: if there is no such file or it is empty.
    """
    if not path.is_file():
        raise DataError(f"{option}: no file {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{option}: {path} is empty; write one entry a line")
    return lines


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--openings", required=True, help="file with one opening a line")
    made.add_argument("--output", type=Path, required=True, help="file to write (.jsonl)")
    made.add_argument("--model", default="tokenpref.models.smollm2_135m", help="dotted path of the builder")
    made.add_argument("--checkpoint", default="models/smollm2-135m-instruct", help="HF checkpoint folder")
    made.add_argument("--model-type", default="LLAMA3_2", help="torchtune's name of the architecture")
    made.add_argument("--reward", default="tokenpref.rewards.VaderReward", help="dotted path of the reward")
    made.add_argument("--reward-args", type=json.loads, default={}, help="its arguments, as JSON")
    made.add_argument("--samples", type=int, default=64, help="of each opening (default: %(default)s)")
    made.add_argument("--group", type=int, default=4, help="samples per pair (default: %(default)s)")
    made.add_argument("--min-gap", type=float, default=0.3, help="in reward (default: %(default)s)")
    made.add_argument("--drop-words", help="file with words, one a line; pairs that contain one are left out")
    made.add_argument("--max-new-tokens", type=int, default=40, help="(default: %(default)s)")
    made.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the samples and the order of rows")
    return made


def make(arguments: argparse.Namespace) -> str:
    """Write the pairs; returns a line about them.

    Raises:
        TokenprefError: for arguments that cannot work.
    """
    if arguments.group < 2 or arguments.samples < arguments.group or arguments.min_gap <= 0:
        raise ConfigError(
            f"--group {arguments.group} --samples {arguments.samples} --min-gap {arguments.min_gap}: a pair needs a "
            "group of at least 2, as many samples, and a gap above 0"
        )
    openings = lines_of(resolve_path(arguments.openings), "--openings")
    drop = lines_of(resolve_path(arguments.drop_words), "--drop-words") if arguments.drop_words else []
    reward = load_reward(arguments.reward, arguments.reward_args)
    world = single_process_world(torch.device(arguments.device))
    folder = resolve_path(arguments.checkpoint)
    model = load_model(arguments.model, folder, arguments.model_type, world)
    groups = sample_groups(
        model,
        tokenizer_json(folder),
        reward,
        openings,
        samples=arguments.samples,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        world=world,
    )
    words = frozenset(word.strip().lower() for word in drop)
    rows = [
        row
        for opening, samples in zip(openings, groups, strict=True)
        for row in pairs_of(
            opening, samples, group=arguments.group, min_gap=arguments.min_gap, reward=reward, drop=words
        )
    ]
    random.Random(arguments.seed).shuffle(rows)
    write_whole(arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    every = [s for samples in groups for s in samples]
    mean = sum(s.reward for s in every) / len(every)
    num_groups = len(openings) * (arguments.samples // arguments.group)
    return (
        f"{arguments.output}: {len(rows)} pairs of {num_groups} groups; mean reward of all "
        f"{len(every)} samples {mean:+.3f}; {sum(s.ended for s in every)} of them ended before the limit"
    )


def main(argv: Sequence[str] | None = None) -> int:
    try:
        print(make(parser().parse_args(argv)))
    except TokenprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
