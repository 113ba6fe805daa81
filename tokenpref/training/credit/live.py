"""The contracts of sources of scores and of anchors, and how often they refresh their results during a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tokenpref._checks import check_choice
from tokenpref.data import Answer, PairBatch, PreferenceDataset
from tokenpref.distributed import World
from tokenpref.errors import ConfigError
from tokenpref.models.reference import CachedReference, FrozenReference, Reference
from tokenpref.models.scoring import ScoringModel

__all__ = ["AnchorSource", "LiveModels", "Refresh", "RefreshedScores", "RowCache", "TokenScores"]

T = TypeVar("T")
REFRESH = ("every_step", "every_n_steps", "once")


@dataclass(frozen=True)
class LiveModels:
    """The models of a run at one moment, as a source sees them.

    Args:
        policy: the model in training. In an estimation: the config's model, or None if the source opens its own weights.
        reference: the reference of the run. In an estimation: the same model.
        world: the run's processes.
        pad_id: padding token.
        eos_id: token that ends an answer.
        step: optimizer steps done.
        maker: makes further models (:class:`tokenpref.training.loading.models.ModelMaker`).
        trained: False in an estimation, where nothing is trained.
    """

    policy: ScoringModel
    reference: Reference
    world: World
    pad_id: int
    eos_id: int
    step: int
    maker: Any = None
    trained: bool = True

    def frozen(self, key: str) -> ScoringModel:
        """The reference's own model.

        Args:
            key: what asks for it, for the error.

        Raises:
            ConfigError: if the run's reference is no model that can be asked.
        """
        if isinstance(self.reference, CachedReference):
            raise ConfigError(
                f"{key}: looks at the reference model, of which this run keeps the answers alone (reference: cached); set "
                "reference=model"
            )
        if not isinstance(self.reference, FrozenReference):
            raise ConfigError(
                f"{key}: looks at the reference model, and this run has none (the loss needs no 'ref'); use a loss that "
                "compares with a reference, or stored weights"
            )
        return self.reference.scorer


class TokenScores(Protocol):
    """A source of scores of tokens: attribution, prompts, a contrastive pair, a store, columns of the data, or your own.

    Configs name it by its dotted path: as ``token_weights`` of a training, which asks it for every micro-batch, or as
    ``estimator`` of ``recipes/estimate_weights_distributed``, which asks it once for every answer and writes a store. It needs no
    base class, and only the two members below. It may also have:

    - ``bind(dataset)``: receives the data set of the batches that follow, before any model is built.
    - ``refresh``: a :class:`Refresh`, if a training may use its results for more than one step.
    - ``timed_as``: a training logs its time as ``time/<timed_as>``; "weights" by default.
    - ``asks_reference``: true if it calls :meth:`LiveModels.frozen`, so that a training without such a model is refused early.
    - ``check_context(limit)``: raises if a sequence that it makes exceeds a model's context of so many tokens.
    - ``whole_pairs``: false if it does not need both answers of a pair at once; an estimation then batches answers by length.
    - ``runs_model``: false if it runs no model, so that an estimation needs none.
    - ``own_nbytes(maker)``: bytes of a process that models of its own take during a training, for the estimate of memory.
    - ``settings()``: what decides its scores beside data and model, as plain data, for the record of a store. By default these
      are its dotted path and its arguments.

    A source that runs further weights than those of the run, as a contrastive pair does, has ``check_models(maker, tokenizer)``,
    ``open(models)`` and ``describe(maker)``, which take the place of ``settings()`` and of the config's own weights. One that
    knows all scores before any model runs has ``load(dataset)`` in the place of ``score``; see
    :class:`tokenpref.data.ScoreSource`.
    """

    kind: str
    """``weight``, ``log_ratio`` or ``tis_release``; see :data:`tokenpref.weights.SCORE_KINDS`."""

    def score(self, batch: PairBatch, models: LiveModels) -> list[Tensor]:
        """One vector for each row of the batch's tokens, as long as the answer (empty for a filler); called on every rank.

        ``batch.answers`` says which row of the data and which side each of them is.
        """
        ...


class AnchorSource(Protocol):
    """Third answers. Configs name it (``anchors``) by its dotted path."""

    def bind(self, dataset: PreferenceDataset) -> None:
        """Receive the data set of the rows that follow."""
        ...

    def answers(self, rows: Sequence[int], models: LiveModels) -> list[Answer | None]:
        """An anchor for each row of the data, None for a filler (row -1); called on every rank."""
        ...


class Refresh:
    """How long the result of a row is used.

    Args:
        refresh: "every_step"; "every_n_steps": the result of a row is computed again when it is n steps old;
            "once": it is computed when the row first occurs.
        every_n_steps: n, with "every_n_steps" only.

    Raises:
        ConfigError: for an unknown word, or an n that is missing, below 1 or out of place.
    """

    def __init__(self, refresh: str = "every_step", every_n_steps: int | None = None) -> None:
        try:
            self.refresh = check_choice("refresh", refresh, REFRESH)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        wanted = refresh == "every_n_steps"
        good = isinstance(every_n_steps, int) and not isinstance(every_n_steps, bool) and every_n_steps >= 1
        if wanted and not good:
            raise ConfigError(
                f"every_n_steps: refresh: every_n_steps needs a whole number of at least 1, found {every_n_steps!r}"
            )
        if not wanted and every_n_steps is not None:
            raise ConfigError(
                f"every_n_steps: is {every_n_steps!r}, but refresh is {refresh}; set refresh: every_n_steps, or remove it"
            )
        self._steps = every_n_steps

    @property
    def keeps(self) -> bool:
        """Whether results outlive their step."""
        return self.refresh != "every_step"

    def is_stale(self, made_at: int, step: int) -> bool:
        """Whether a result of an earlier step must be computed again."""
        return self.refresh == "every_step" or (self._steps is not None and step - made_at >= self._steps)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A row's result as it is kept.

    Args:
        step: optimizer steps done when it was made.
        lengths: of its parts.
        values: all parts one after the other, ``[sum of lengths]``, in main memory.
    """

    step: int
    lengths: tuple[int, ...]
    values: Tensor

    def parts(self) -> list[Tensor]:
        return list(self.values.split(self.lengths))


class RowCache(Generic[T]):
    """Results by row of the data, refreshed as :class:`Refresh` says, and the same on every rank.

    In the next epoch another rank may process a row, so every result is sent to all ranks at once. A result therefore depends on
    the row and on the step at which it was computed, and not on the number of ranks or on a restart in between.

    What this costs, for results of n numbers a row: every rank keeps all rows in main memory, 4 n bytes and about 1 KB for
    each (with 500-token answers about 5 KB a pair, 0.5 GB for 100,000 pairs). A micro-batch costs one all-reduce of a number and,
    where any rank makes a result, one all-gather of the new results. With ``refresh: every_step`` nothing is kept or sent.

    Args:
        refresh: when.
        pack: converts a result to a fixed number of one-dimensional tensors of one dtype.
        unpack: the inverse of ``pack``; it gets tensors in main memory.
    """

    def __init__(
        self, refresh: Refresh, pack: Callable[[T], list[Tensor]], unpack: Callable[[list[Tensor]], T]
    ) -> None:
        self._refresh, self._pack, self._unpack = refresh, pack, unpack
        self._kept: dict[int, _Kept] = {}
        self._rank, self._ranks = 0, 1

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's share of the kept results, in tensors that can be concatenated over ranks."""
        rows = list(self._kept)[self._rank :: self._ranks]
        return _joined({row: self._kept[row] for row in rows})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the results of all ranks. If several ranks have a row, the newest result counts."""
        for row, kept in _separated(state):
            if row not in self._kept or self._kept[row].step < kept.step:
                self._unpack(kept.parts())  # raises before anything is restored
                self._kept[row] = kept

    def get(
        self, rows: Sequence[int], models: LiveModels, make: Callable[[list[int]], Sequence[T]]
    ) -> list[T | None]:
        """Results of a batch's rows. Every rank must call it.

        Args:
            rows: row numbers; -1 for a filler, whose result is None.
            models: the run as it is.
            make: makes results for the rows of the given places of the batch. It runs on every rank or on none,
                perhaps with no place at all, so that its forwards meet those of other ranks.
        """
        places = [place for place, row in enumerate(rows) if row >= 0 and self._is_missing(row, models.step)]
        if not self._refresh.keeps:  # all ranks decide the same without communication
            found = dict(zip(places, make(places), strict=True))
            return [found.get(place) for place in range(len(rows))]
        if models.world.any(bool(places)):
            made = zip(places, make(places), strict=True)
            self._share(
                {rows[place]: _keep(models.step, self._pack(result)) for place, result in made}, models
            )
        return [self._unpack(self._kept[row].parts()) if row >= 0 else None for row in rows]

    def _is_missing(self, row: int, step: int) -> bool:
        return row not in self._kept or self._refresh.is_stale(self._kept[row].step, step)

    def _share(self, made: Mapping[int, _Kept], models: LiveModels) -> None:
        """Exchange new results with all ranks."""
        self._rank, self._ranks = models.world.rank, models.world.size
        for state in models.world.gather_objects(_joined(made)):
            self._kept.update(_separated(state))


class RefreshedScores:
    """A source whose results by row are kept as its ``refresh`` says, for a training.

    Args:
        source: a source of scores that has ``refresh``.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._cache: RowCache[list[Tensor]] = RowCache(source.refresh, list, list)
        self.state_dict, self.load_state_dict = self._cache.state_dict, self._cache.load_state_dict

    def check_context(self, limit: int) -> None:
        """See :class:`TokenScores`."""
        if hasattr(self._source, "check_context"):
            self._source.check_context(limit)

    def own_nbytes(self, maker: Any) -> int:
        """See :class:`TokenScores`."""
        return int(self._source.own_nbytes(maker)) if hasattr(self._source, "own_nbytes") else 0

    def score(self, batch: PairBatch, models: LiveModels) -> list[Tensor]:
        """See :class:`TokenScores`."""
        pairs, sides = len(batch.rows), range(len(batch.sides))

        def make(places: list[int]) -> list[list[Tensor]]:
            # All rows of the batch, so that every rank runs the same forwards; each rank then uses the rows that it needs.
            scores = self._source.score(batch, models)
            return [[scores[side * pairs + place] for side in sides] for place in places]

        nothing = [torch.zeros(0)] * len(sides)
        by_pair = [nothing if found is None else found for found in self._cache.get(batch.rows, models, make)]
        return [pair[side] for side in sides for pair in by_pair]


def _keep(step: int, parts: Sequence[Tensor]) -> _Kept:
    return _Kept(step, tuple(len(part) for part in parts), torch.cat([part.detach().cpu() for part in parts]))


def _joined(kept: Mapping[int, _Kept]) -> dict[str, Tensor]:
    """Kept results as a few tensors."""
    if not kept:
        return {}
    return {
        "rows": torch.tensor(list(kept)),
        "steps": torch.tensor([one.step for one in kept.values()]),
        "lengths": torch.tensor([one.lengths for one in kept.values()]),
        "values": torch.cat([one.values for one in kept.values()]),
    }


def _separated(state: Mapping[str, Tensor]) -> Iterator[tuple[int, _Kept]]:
    """The inverse of :func:`_joined`, with a copy of each result."""
    if not state:
        return
    lengths = state["lengths"].tolist()
    values = state["values"].split([sum(parts) for parts in lengths])
    for row, step, parts, own in zip(
        state["rows"].tolist(), state["steps"].tolist(), lengths, values, strict=True
    ):
        yield row, _Kept(step, tuple(parts), own.clone())
