"""Scores from a weight store, matched to a data set row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokenpref._paths import resolve_path
from tokenpref.data.dataset import PreferenceDataset
from tokenpref.data.weight_store import WeightStore
from tokenpref.errors import DataError

__all__ = ["PairScores", "ScoreSource", "StoredScores", "provenance"]

PairScores = tuple[np.ndarray, np.ndarray]
"""Scores of the chosen and of the rejected answer, one per token; nan for a token (EOS) without a score."""


class ScoreSource(Protocol):
    """Where token weights come from: anything with a kind that can score a data set. Named in configs by dotted path."""

    kind: str
    """``weight``, ``log_ratio`` or ``tis_release``; see :data:`tokenpref.weights.SCORE_KINDS`."""

    def load(self, dataset: PreferenceDataset) -> list[PairScores]:
        """Scores of all pairs, in the data set's order.

        Raises:
            DataError: naming the row that has none, or bad ones, and the mend.
        """
        ...


class StoredScores:
    """Scores that ``recipes/estimate_weights_distributed`` wrote.

    Rows are matched by the hash of their training token ids. The data may be a subset of the scored data, in any order;
    any other difference is an error.

    Args:
        path: the store's folder.

    Raises:
        DataError: if the store is missing, unfinished or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.store = WeightStore.open(resolve_path(path))
        self.kind = self.store.kind

    def load(self, dataset: PreferenceDataset) -> list[PairScores]:
        """See :class:`ScoreSource`."""
        self._check_tokenizer(dataset)
        scores: list[PairScores] = []
        missing: list[int] = []
        for index, example in enumerate(dataset):
            row = self.store.find(example.key)
            if row is None:
                missing.append(index)
                continue
            lengths = (
                len(example.chosen_ids) - example.chosen_start,
                len(example.rejected_ids) - example.rejected_start,
            )
            if (len(row.chosen), len(row.rejected)) != lengths:
                raise DataError(
                    f"{self.store.path}: {dataset.locate(index)} has {lengths[0]} and {lengths[1]} answer tokens and "
                    f"{len(row.chosen)} and {len(row.rejected)} scores; the store is damaged, estimate the weights again"
                )
            scores.append((row.chosen, row.rejected))
        if missing:
            raise DataError(self._missing(dataset, missing))
        return scores

    def _check_tokenizer(self, dataset: PreferenceDataset) -> None:
        for name, own in (
            ("template", dataset.tokenizer.template_fingerprint()),
            ("tokenizer", dataset.tokenizer.fingerprint()),
        ):
            stored = self.store.metadata.get(name)
            if stored != own:
                what = "chat template" if name == "template" else "tokenizer"
                raise DataError(
                    f"{self.store.path}: the scores were made with another {what} ({str(stored)[:12]}, here {own[:12]}), "
                    f"first seen at {dataset.locate(0)}; train with that one, or estimate the weights again"
                )

    def _missing(self, dataset: PreferenceDataset, missing: list[int]) -> str:
        first = missing[0]
        message = f"{self.store.path}: {dataset.locate(first)} has no scores in the store"
        if len(missing) > 1:
            message += f" (nor have {len(missing) - 1} further rows of {len(dataset)})"
        stored, own = self.store.metadata.get("data", {}), provenance(dataset)["data"]
        differing = [
            f"{key} is {value!r} here and was {stored.get('settings', {}).get(key)!r} there"
            for key, value in own["settings"].items()
            if value != stored.get("settings", {}).get(key)
        ]
        if differing:
            message += ": " + "; ".join(differing) + ". Set the dataset as it was"
        elif self.store.has_row(dataset[first].row):
            message += f": row {dataset[first].row} has other tokens there, so the data changed. Use the data of the store"
        else:
            message += f": it was made from {stored.get('rows')} rows of {stored.get('source')}"
        return message + ", or estimate the weights of this data again."


def provenance(dataset: PreferenceDataset) -> dict[str, Any]:
    """What scores of a data set depend on beside the models: for a store's metadata."""
    return {
        "tokenizer": dataset.tokenizer.fingerprint(),
        "template": dataset.tokenizer.template_fingerprint(),
        "data": {
            "source": dataset.source_name,
            "rows": len(dataset),
            "fingerprint": dataset.fingerprint(),
            "settings": dataset.settings(),
        },
    }
