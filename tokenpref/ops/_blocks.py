"""The LM head's statistics and their gradients, a block of the vocabulary at a time.

With rows n, tokens v, policy logits z = hidden @ W^T and reference logits z', one pass over blocks of columns gives for each row

* the sums of exp(z - m) and exp(z' - m') with running maxima m and m', so both log-sum-exps,
* the sums of exp(z' - m') d, exp(z - m) d with d = z - z', and of exp(z - m) (z - m), so both KLs and the entropy: with p and q
  the softmax of z and z', KL(q || p) = lse - lse' - sum_v q d,
* the sum of exp(z' - m') expm1(d), so lse - lse' = log1p(sum_v q expm1(d)) to the last digit where the models are close: as a
  difference of two log-sum-exps it would carry the rounding of both, which is larger than a small KL.

Blocks of columns rather than of rows: a block reads its part of the heads once, its gradient is a part of the head's gradient
that is written once, and its logits of all rows stay in the cache for the passes over them. The gradient of the log-probability
is -g (p - e_y): rows of exp(z - m) times one number, which goes to the factors of the matrix products instead of
the block itself.

What the forward leaves in memory follows a budget. As many blocks as fit keep their exponentials and spare the backward their
products; the others are computed again. Where the head is frozen, the forward ends with the gradient vectors of each row,
and the backward needs no block at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenpref.ops._closed_form import KL_STATISTICS, RowStatistics, accumulation_dtype, logit_gradient

__all__ = ["Blocks", "Found", "Heads", "backward_blocks", "forward_blocks", "plan_blocks"]

MIB = 1 << 20
# Two ways to one number that differ by more than float32's rounding of logits: the first one has overflowed.
_CLOSE = 1e-4
# On a CPU the passes over a block shall find it in the last-level cache; a GPU wants few and large kernels.
_BLOCK_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
# Rows of logits that do not begin on a cache line's boundary cost a product on a CPU a third of its speed.
_UNIT = 64


@dataclass(frozen=True)
class Blocks:
    """How the vocabulary is cut.

    Args:
        vocabulary: columns in all.
        columns: of a block; the last one may be narrower.
        kept: how many blocks, the last ones, keep their exponentials for the backward.
    """

    vocabulary: int
    columns: int
    kept: int = 0

    def __len__(self) -> int:
        return -(-self.vocabulary // self.columns)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.vocabulary, self.columns):
            yield slice(start, min(start + self.columns, self.vocabulary))

    def keeps(self, number: int) -> bool:
        """Whether a block's exponentials are kept."""
        return number >= len(self) - self.kept


def plan_blocks(
    rows: int, vocabulary: int, *, models: int, dtype: torch.dtype, device: torch.device, budget: int
) -> Blocks:
    """Blocks whose logits, with what is kept of them, take at most ``budget`` bytes (but at least one column does).

    Args:
        rows: rows that are scored.
        vocabulary: columns of the head.
        models: 1 for the policy alone, 2 with a reference.
        dtype: of the hidden states, in which exponentials are kept.
        device: where they are.
        budget: bytes.
    """
    # A column at work: each model's logits, and one more for what is made of both.
    column = max(rows, 1) * accumulation_dtype(dtype).itemsize * (2 * models - 1)
    target = min(_BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"]), budget)
    columns = min(max(target // column, 1), vocabulary)
    unit = _UNIT if _UNIT <= columns < vocabulary else 1
    columns = columns // unit * unit
    # As equal as can be: the same number of blocks, the last one not much narrower.
    columns = -(-vocabulary // -(-vocabulary // columns) // unit) * unit
    kept_block = max(rows, 1) * columns * dtype.itemsize * models
    count = -(-vocabulary // columns)
    return Blocks(vocabulary, columns, max(min((budget - columns * column) // kept_block, count), 0))


@dataclass(frozen=True)
class Heads:
    """Rows to score and the heads that score them.

    Args:
        hidden: policy's last hidden states ``[N, D]``.
        weight: policy's head ``[V, D]``.
        targets: ``[N]`` int64, the predicted tokens.
        ref_hidden: reference's ``[N, D']``, where it is needed.
        ref_weight: reference's ``[V, D']``.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and head of the policy, and of the reference if there is one."""
        own = [(self.hidden, self.weight)]
        if self.ref_hidden is not None and self.ref_weight is not None:
            own.append((self.ref_hidden, self.ref_weight))
        return own


@dataclass
class Found:
    """What a forward found.

    Args:
        values: statistics ``[N]`` by the name of their field in TokenStats.
        lse: log-sum-exps ``[N]`` of the policy and the reference.
        shifts: for each kept block, what was subtracted from the models' logits ``[N]``.
        kept: for each kept block, the models' exponentials ``[N, columns]``.
        vectors: for a frozen head, sum_v p_v W_v and sum_v q_v W_v, ``[N, D]``.
    """

    values: dict[str, Tensor]
    lse: list[Tensor]
    shifts: list[list[Tensor]] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)


class _Sums:
    """A model's running sums over blocks, ``[N]`` in float64.

    Attributes:
        shift: the largest logit so far, which the exponentials are relative to.
        total: sum of exponentials.
        gap: of exponentials times the distance of the models' logits.
        growth: of exponentials times expm1 of that distance.
        own: of exponentials times the model's own shifted logits.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shift = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        self.total = torch.zeros(rows, dtype=torch.float64, device=device)
        self.gap = torch.zeros_like(self.total)
        self.own = torch.zeros_like(self.total)
        self.growth = torch.zeros_like(self.total)

    def take(self, logits: Tensor, *, entropy: bool) -> Tensor:
        """Turn a block of logits into ``exp(logits - shift)`` in place; returns the factor by which earlier sums shrank."""
        shift = torch.maximum(self.shift, logits.amax(-1))
        moved = torch.where(self.shift.isinf(), 0.0, (self.shift - shift).double())
        shrink = moved.exp()
        self.shift = shift
        logits.sub_(shift[:, None]).exp_()
        if entropy:  # exp(z - m) (z - m), from the exponentials alone
            self.own = shrink * (self.own + moved * self.total) + torch.xlogy(logits, logits).sum(-1)
        self.total = shrink * self.total + logits.sum(-1)
        self.gap, self.growth = shrink * self.gap, shrink * self.growth
        return shrink

    @property
    def lse(self) -> Tensor:
        return self.shift.double() + self.total.log()


class _Targets:
    """The rows whose target lies in a block, found without looking at all rows each time."""

    def __init__(self, targets: Tensor, blocks: Blocks) -> None:
        self._columns, self._rows = targets.sort()
        edges = torch.tensor([*(part.start for part in blocks), blocks.vocabulary], device=targets.device)
        self._edges = torch.searchsorted(self._columns, edges).tolist()

    def of(self, number: int, part: slice) -> tuple[Tensor, Tensor]:
        """Rows, and the columns of their targets inside the block."""
        here = slice(self._edges[number], self._edges[number + 1])
        return self._rows[here], self._columns[here] - part.start


class _Scratch:
    """Memory for a block's logits that every block uses again."""

    def __init__(self, heads: Heads, blocks: Blocks, count: int) -> None:
        self._rows = heads.hidden.shape[0]
        dtype = accumulation_dtype(heads.hidden.dtype)
        self._flat = [heads.hidden.new_empty(self._rows * blocks.columns, dtype=dtype) for _ in range(count)]

    def get(self, index: int, width: int) -> Tensor:
        """``[N, width]``."""
        return self._flat[index][: self._rows * width].view(self._rows, width)


class _Kept:
    """Memory for the exponentials that the backward will use.

    In one piece for each model: many pieces, freed and taken again every step beside the head's gradient, leave an allocator
    with holes that fit neither.
    """

    def __init__(self, heads: Heads, blocks: Blocks, count: int) -> None:
        self._rows = heads.hidden.shape[0]
        widths = [part.stop - part.start for number, part in enumerate(blocks) if blocks.keeps(number)]
        self._free = [heads.hidden.new_empty(self._rows * sum(widths)) for _ in range(count)]

    def take(self, index: int, width: int) -> Tensor:
        """The next ``[N, width]`` of a model."""
        size = self._rows * width
        taken, self._free[index] = self._free[index][:size], self._free[index][size:]
        return taken.view(self._rows, width)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Logits in the accumulation dtype; in the model's own first, as its output layer would round them."""
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    return out.copy_(hidden @ weight.T)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Sums over columns of ``left * right``, ``[N]``, without a tensor of that size."""
    return torch.bmm(left[:, None, :], right[:, :, None])[:, 0, 0]


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` of half precision without rounding the product to it."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def forward_blocks(heads: Heads, needs: frozenset[str], blocks: Blocks, *, vectors: bool = False) -> Found:
    """Statistics of rows.

    Args:
        heads: the rows; with a reference if ``needs`` asks for one.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".
        blocks: how to cut the vocabulary.
        vectors: form the gradient vectors of a frozen head, with blocks of which none is kept.
    """
    pairs, hidden = heads.pairs, heads.hidden
    dtype = accumulation_dtype(hidden.dtype)
    scratch = _Scratch(heads, blocks, len(pairs) + bool(needs & KL_STATISTICS))
    sums = [_Sums(hidden.shape[0], dtype, hidden.device) for _ in pairs]
    at = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in pairs]
    found = Found({}, [])
    if vectors:
        found.vectors = [hidden.new_zeros(hidden.shape, dtype=torch.float64) for _ in pairs]
    where, room = _Targets(heads.targets, blocks), _Kept(heads, blocks, len(pairs))
    for number, part in enumerate(blocks):
        width = part.stop - part.start
        keep = blocks.keeps(number)
        own = []
        for index, (states, weight) in enumerate(pairs):
            # What is kept in the dtype of the arithmetic is made where it will stay.
            in_place = keep and hidden.dtype == dtype
            out = room.take(index, width) if in_place else scratch.get(index, width)
            own.append(_logits(states, weight[part], out))
        rows, columns = where.of(number, part)
        for target_logits, logits in zip(at, own, strict=True):
            target_logits[rows] = logits[rows, columns]
        gap = torch.sub(own[0], own[1], out=scratch.get(-1, width)) if needs & KL_STATISTICS else None
        for index, (model, logits) in enumerate(zip(sums, own, strict=True)):
            shrink = model.take(logits, entropy=index == 0 and "entropy" in needs)
            if vectors:
                product = _product(logits.to(hidden.dtype), heads.weight[part], dtype)
                found.vectors[index].mul_(shrink[:, None]).add_(product)
        if gap is not None:
            if "kl_ref_policy" in needs:
                sums[1].gap += _dots(own[1], gap)
            if "kl_policy_ref" in needs:
                sums[0].gap += _dots(own[0], gap)
            sums[1].growth += _dots(own[1], gap.expm1_())
        if keep:
            found.shifts.append([model.shift for model in sums])
            same = hidden.dtype == dtype
            found.kept.append(own if same else [room.take(i, width).copy_(e) for i, e in enumerate(own)])
    for vector, model in zip(found.vectors, sums, strict=False):
        vector /= model.total[:, None]
    found.vectors = [vector.to(dtype) for vector in found.vectors]
    found.values = _values(sums, at, needs)
    found.lse = [model.lse.to(dtype) for model in sums]
    return found


def _values(sums: list[_Sums], at: list[Tensor], needs: frozenset[str]) -> dict[str, Tensor]:
    policy, dtype = sums[0], at[0].dtype
    found = {"policy_logps": at[0].double() - policy.lse}
    if "entropy" in needs:
        found["entropy"] = policy.total.log() - policy.own / policy.total
    if len(sums) == 2:
        reference = sums[1]
        if "ref" in needs:
            found["ref_logps"] = at[1].double() - reference.lse
        apart = _apart(policy, reference)
        # Rounding may leave a little less than nothing.
        if "kl_ref_policy" in needs:
            found["kl_ref_policy"] = (apart - reference.gap / reference.total).clamp(min=0)
        if "kl_policy_ref" in needs:
            found["kl_policy_ref"] = (policy.gap / policy.total - apart).clamp(min=0)
    return {name: value.to(dtype) for name, value in found.items()}


def _apart(policy: _Sums, reference: _Sums) -> Tensor:
    """lse - lse', from the sum of expm1 unless that overflowed or lost what the reference gives no probability to."""
    difference = policy.lse - reference.lse
    close = (reference.growth / reference.total).log1p()
    return torch.where((close - difference).abs() < _CLOSE, close, difference)


def backward_blocks(
    heads: Heads,
    found: Found,
    grads: Mapping[str, Tensor],
    blocks: Blocks,
    *,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the policy's hidden states and head.

    Args:
        heads: the forward's rows.
        found: what it found.
        grads: incoming gradients ``[N]`` by the statistic's field in TokenStats; absent means zero.
        blocks: the forward's.
        want_hidden: whether the hidden states want a gradient.
        want_weight: whether the head wants one.
    """
    if found.vectors:
        return _from_vectors(heads, found.vectors, grads), None
    step = _Backward(heads, found, grads, blocks)
    grad_hidden = torch.zeros_like(heads.hidden, dtype=step.dtype) if want_hidden else None
    grad_weight = torch.empty_like(heads.weight) if want_weight else None
    # Where nothing has to be rounded on the way, products go straight to their place, and all targets at once.
    direct = heads.hidden.dtype == heads.weight.dtype == step.dtype
    # The last blocks of the forward are the ones that the cache still holds, and those that were kept.
    for number, part in reversed(list(enumerate(blocks))):
        block, scale = step.block(number, part)
        factor = step.factor if scale is None else step.factor * scale
        narrow = block.to(heads.hidden.dtype)
        if grad_hidden is not None:
            product = _product(narrow, heads.weight[part], step.dtype)
            grad_hidden.addcmul_(factor[:, None], product)
        if grad_weight is None:
            continue
        scaled = (heads.hidden * factor[:, None]).to(heads.hidden.dtype)
        if direct:
            torch.mm(narrow.T, scaled, out=grad_weight[part])
        else:
            rows, columns = step.where.of(number, part)
            whole = _product(narrow.T, scaled, step.dtype)
            ones = heads.hidden[rows].to(step.dtype) * step.at_target[rows, None]
            grad_weight[part] = whole.index_add_(0, columns, ones)
    if grad_weight is not None and direct:
        grad_weight.index_add_(0, heads.targets, heads.hidden * step.at_target[:, None])
    if grad_hidden is not None:
        grad_hidden.addcmul_(step.at_target[:, None], heads.weight[heads.targets].to(step.dtype))
        grad_hidden = grad_hidden.to(heads.hidden.dtype)
    return grad_hidden, grad_weight


def _from_vectors(heads: Heads, vectors: list[Tensor], grads: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    if (grad := grads.get("policy_logps")) is not None:
        total.addcmul_(grad[:, None], heads.weight[heads.targets].to(total.dtype) - vectors[0])
    if (grad := grads.get("kl_ref_policy")) is not None:
        total.addcmul_(grad[:, None], vectors[0] - vectors[1])
    return total.to(heads.hidden.dtype)


class _Backward:
    """Blocks of the gradient with respect to the logits, as ``factor[n] * scale[n] * block[n, v] + at_target[n] e_y``."""

    def __init__(self, heads: Heads, found: Found, grads: Mapping[str, Tensor], blocks: Blocks) -> None:
        self._heads, self._found, self._blocks = heads, found, blocks
        self.dtype = accumulation_dtype(heads.hidden.dtype)
        self._grads = dict(grads)
        self.where = _Targets(heads.targets, blocks)
        nothing = torch.zeros_like(found.lse[0])
        self.at_target = self._grads.get("policy_logps", nothing)
        self._simple = self._grads.keys() <= {"policy_logps"}
        # Of the log-probability alone the block needs no arithmetic: -g p is the exponentials times one number a row.
        self.factor = -self.at_target if self._simple else torch.ones_like(nothing)
        self._closed = self._grads.keys() & {"kl_policy_ref", "entropy"}
        used = heads.pairs if not self._simple else heads.pairs[:1]
        self._used = used
        self._scratch = _Scratch(heads, blocks, len(used))

    def block(self, number: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """A block and its scale (None: ones)."""
        width = part.stop - part.start
        kept = number - (len(self._blocks) - self._blocks.kept)
        if kept >= 0 and self._simple:
            scale = (self._found.shifts[kept][0] - self._found.lse[0]).exp()
            return self._found.kept[kept][0], scale
        if kept >= 0 and not self._closed:
            return self._mixed(self._found.kept[kept], self._found.shifts[kept], width), None
        logits = [
            _logits(states, weight[part], self._scratch.get(index, width))
            for index, (states, weight) in enumerate(self._used)
        ]
        if self._closed:
            rows = RowStatistics(self._found.values, self._found.lse[0], self._reference_lse())
            ref_logits = logits[1] if len(logits) == 2 else None
            return logit_gradient(logits[0], ref_logits, None, rows, self._grads), None
        probabilities = [z.sub_(lse[:, None]).exp_() for z, lse in zip(logits, self._found.lse, strict=False)]
        return (probabilities[0] if self._simple else self._mixed(probabilities, None, width)), None

    def _mixed(self, exponentials: list[Tensor], shifts: list[Tensor] | None, width: int) -> Tensor:
        """(g' - g) p - g' q, from exponentials relative to ``shifts`` (None: probabilities).

        Each product is rounded before they meet, so that a KL alone leaves exactly nothing at p = q: one fused pass would
        leave the rounding of one of them.
        """
        of_kl = self._grads["kl_ref_policy"]
        factors = [of_kl - self.at_target, -of_kl]
        if shifts is not None:
            factors = [
                factor * (shift - lse).exp()
                for factor, shift, lse in zip(factors, shifts, self._found.lse, strict=True)
            ]
        p, q = (
            torch.mul(values, factor[:, None], out=self._scratch.get(index, width))
            for index, (values, factor) in enumerate(zip(exponentials, factors, strict=True))
        )
        return p.add_(q)

    def _reference_lse(self) -> Tensor | None:
        return self._found.lse[1] if len(self._found.lse) == 2 else None
