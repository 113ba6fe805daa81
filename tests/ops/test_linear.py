import pytest
import torch
from support.heads import LABELS, make, total
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpref.ops import (
    HeadRoom,
    _blocks,
    _scratch,
    linear_token_stats,
    score_tokens,
    token_stats_from_logits,
)
from tokenpref.ops._backward import _add_rounded
from tokenpref.ops._blocks import Blocks, Heads, plan_blocks
from tokenpref.ops._forward import forward_blocks
from tokenpref.ops._scratch import Kept

ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
BUDGETS = [1e-5, 1e-4, 5e-4, 1e-3, 1]  # MiB: a column at a time, several, some of them kept, all kept


@pytest.mark.parametrize("memory_mb", BUDGETS)
@pytest.mark.parametrize("wanted", ["both", "hidden", "weight"])
@pytest.mark.parametrize(
    "needs",
    [set(), {"ref"}, {"entropy"}, {"ref", "kl_ref_policy"}, {"kl_policy_ref"}, ALL],
    ids=lambda n: "+".join(sorted(n)),
)
def test_values_and_gradients_equal_those_through_logits(memory_mb, wanted, needs):
    hidden, weight, ref_hidden, ref_weight = make()
    hidden.requires_grad_(wanted != "weight")
    weight.requires_grad_(wanted != "hidden")
    needs = frozenset(needs)
    reference = (ref_hidden, ref_weight) if needs - {"entropy"} else (None, None)
    ref_logits = ref_hidden @ ref_weight.T if needs - {"entropy"} else None
    expected = token_stats_from_logits(hidden @ weight.T, ref_logits, LABELS, needs=needs)
    got = linear_token_stats(hidden, weight, *reference, LABELS, needs=needs, memory_mb=memory_mb)
    for name in ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-12, rtol=0)
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    gradients = [torch.autograd.grad(total(stats), inputs) for stats in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("memory_mb", BUDGETS)
@pytest.mark.parametrize("name", ["kl_ref_policy", "kl_policy_ref", "entropy"])
@pytest.mark.parametrize(
    "rows",
    [slice(0, 3), slice(3, 8), slice(2, 5), slice(0, 8), slice(0, 0)],
    ids=["first", "last", "middle", "all", "none"],
)
def test_a_statistic_with_gradients_at_some_rows_only(memory_mb, name, rows):
    hidden, weight, ref_hidden, ref_weight = make()
    needs = frozenset({"ref", "kl_ref_policy", name})
    factors = torch.zeros(8, dtype=torch.float64)
    factors[rows] = torch.arange(1.0, 9.0, dtype=torch.float64)[rows]
    logits = token_stats_from_logits(hidden @ weight.T, ref_hidden @ ref_weight.T, LABELS, needs=needs)
    found = linear_token_stats(
        hidden, weight, ref_hidden, ref_weight, LABELS, needs=needs, memory_mb=memory_mb
    )
    gradients = []
    for stats in (found, logits):
        of_logps = (stats.policy_logps[stats.mask] * torch.arange(8.0)).sum()
        scalar = of_logps + (getattr(stats, name)[stats.mask] * factors).sum()
        gradients.append(torch.autograd.grad(scalar, (hidden, weight)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0)


def test_rows_without_a_gradient_of_the_kl_cost_no_product_of_the_reference():
    # As in TDPO2: both answers' KLs are values of the loss, the gradient is the rejected one's alone.
    hidden, weight = torch.randn(1, 9, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    labels = torch.arange(9)[None]
    needs = frozenset({"kl_ref_policy"})
    stats = linear_token_stats(
        hidden, weight, torch.randn(1, 9, 3), torch.randn(64, 3), labels, needs=needs, memory_mb=1e-3
    )
    loss = stats.policy_logps.sum() + stats.kl_ref_policy[0, 5:].sum()
    with Watch() as watch:
        loss.backward()
    # Only the reference's products have an inner dimension of 3.
    assert {left for (left, inner), _ in watch.products if inner == 3} == {3}
    assert {left for (left, inner), _ in watch.products if inner == 4} >= {3, 5}


def test_the_backward_can_be_asked_twice():
    hidden, weight, ref_hidden, ref_weight = make()
    needs = frozenset({"ref", "kl_ref_policy"})
    stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=needs)
    first = torch.autograd.grad(total(stats), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total(stats), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("memory_mb", BUDGETS)
def test_equal_models_have_no_divergence_and_no_gradient_of_it(memory_mb):
    hidden, weight, _, _ = (x.float() for x in make(vocab=101))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    stats = linear_token_stats(
        hidden, weight, hidden.detach(), weight.detach(), LABELS, needs=ALL, memory_mb=memory_mb
    )
    assert not stats.kl_ref_policy.any() and not stats.kl_policy_ref.any() and not stats.log_ratio.any()
    for gradient in torch.autograd.grad(stats.kl_ref_policy.sum(), (hidden, weight)):
        assert not gradient.any()


def test_logits_far_apart_give_finite_numbers():
    """A target a hundred nats below the rest, and rows whose largest logit grows from block to block."""
    weight = torch.tensor([[-200.0], [0.0], [100.0], [250.0]], requires_grad=True)
    hidden = torch.ones(1, 3, 1, requires_grad=True)
    labels = torch.tensor([[-100, 0, 3]])
    for memory_mb in (1e-6, 1):
        stats = linear_token_stats(
            hidden, weight, None, None, labels, needs=frozenset({"entropy"}), memory_mb=memory_mb
        )
        assert stats.policy_logps.tolist() == [[-450.0, 0.0]] and stats.entropy.abs().max() < 1e-30
        gradients = torch.autograd.grad(stats.policy_logps.sum(), (hidden, weight))
        assert gradients[0].tolist() == [[[-450.0], [0.0], [0.0]]]
        assert gradients[1].flatten().tolist() == [1.0, 0.0, 0.0, -1.0]


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_float32_divergences_are_close_to_float64(scale):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(1, 65, 32, generator=generator),
        torch.randn(3000, 32, generator=generator) / 4,
    )
    ref_hidden = hidden + scale * torch.randn(1, 65, 32, generator=generator)
    labels = torch.randint(3000, (1, 65), generator=generator)
    low, high = (
        linear_token_stats(
            *(x.to(d) for x in (hidden, weight, ref_hidden, weight)), labels, needs=ALL, memory_mb=0.1
        )
        for d in (torch.float32, torch.float64)
    )
    for name in ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"):
        assert (getattr(low, name) - getattr(high, name)).abs().max() < 3e-6, name
        assert name.endswith("logps") or getattr(low, name).min() >= 0


def test_gradcheck_of_hidden_states_and_head():
    hidden, weight, ref_hidden, ref_weight = make()

    def function(h, w):
        return total(linear_token_stats(h, w, ref_hidden, ref_weight, LABELS, needs=ALL, memory_mb=3e-4))

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_neither():
    hidden, weight, ref_hidden, ref_weight = make()
    total(linear_token_stats(hidden, weight.detach(), ref_hidden, ref_weight, LABELS, needs=ALL)).backward()
    assert hidden.grad is not None and weight.grad is None
    body = hidden.grad
    hidden.grad = None
    total(linear_token_stats(hidden.detach(), weight, ref_hidden, ref_weight, LABELS, needs=ALL)).backward()
    assert hidden.grad is None and weight.grad is not None
    total(linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL)).backward()
    assert torch.equal(hidden.grad, body)


def test_a_tied_head_adds_both_gradients():
    # The embedding is the head: its gradient is the head's plus the one through the hidden states.
    _, weight, ref_hidden, ref_weight = make()
    tokens = LABELS.clamp(min=0)
    hidden = torch.tanh(weight[tokens])
    stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, memory_mb=3e-4)
    expected = token_stats_from_logits(hidden @ weight.T, ref_hidden @ ref_weight.T, LABELS, needs=ALL)
    (ours,) = torch.autograd.grad(total(stats), weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(total(expected), weight)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("needs", [frozenset({"ref"}), frozenset({"kl_ref_policy"}), ALL])
def test_a_batch_without_answers_gives_zero_gradients_not_none(needs):
    hidden, weight, ref_hidden, ref_weight = make()
    stats = linear_token_stats(
        hidden, weight, ref_hidden, ref_weight, torch.full_like(LABELS, -100), needs=needs
    )
    total(stats).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def rows_of(seed, room=None, count=6):
    """A head over some rows with a KL, and the gradients of its inputs as a function."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((count, 4), (61, 4), (count, 3), (61, 3))
    )
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    values = score_tokens(
        *inputs,
        torch.randint(61, (count,), generator=generator),
        ref_hidden=ref_hidden,
        ref_head_weight=ref_weight,
        needs=frozenset({"kl_ref_policy"}),
        memory_mb=4e-3,
        room=room,
    )
    scalar = (values["policy_logps"] * torch.arange(count)).sum() - values["kl_ref_policy"][3:].sum()
    return lambda: torch.autograd.grad(scalar, inputs, retain_graph=True)


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


def test_steps_share_the_memory_of_what_is_kept():
    room, places = HeadRoom(), set()
    for seed in range(3):
        backward = rows_of(seed, room)
        assert room._spare is None, "the forward has it"
        assert_same(backward(), rows_of(seed)())
        places.add(room._spare.data_ptr())
    assert len(places) == 1
    with torch.no_grad():
        score_tokens(torch.randn(3, 4), torch.randn(5, 4), torch.arange(3), room=room)
    assert room._spare.data_ptr() in places, "a forward without a backward keeps nothing"
    small = room._spare.numel()
    assert_same(rows_of(3, room, count=5)(), rows_of(3, count=5)())
    assert_same(rows_of(4, room, count=9)(), rows_of(4, count=9)())
    assert room._spare.numel() != small, "another size is taken anew"


def test_a_room_serves_forwards_in_any_order():
    room = HeadRoom()
    first, second = rows_of(0, room), rows_of(1, room)
    assert_same(first(), rows_of(0)())
    third = rows_of(2, room)  # in the first one's memory, whose backward has been
    assert_same(second(), rows_of(1)())
    assert_same(third(), rows_of(2)())
    assert_same(first(), rows_of(0)())  # asked again: all of it is computed again
    rows_of(3, room)  # and one whose backward never comes
    assert_same(rows_of(4, room)(), rows_of(4)())


def test_no_gradient_mode_keeps_no_graph():
    hidden, weight, _, _ = make()
    with torch.no_grad():
        stats = linear_token_stats(hidden, weight, None, None, LABELS, needs=frozenset())
    assert not stats.policy_logps.requires_grad


@pytest.mark.parametrize("memory_mb", [0.01, 100])
def test_head_gradient_in_bfloat16_accumulates_in_float32(memory_mb):
    # 2048 tokens, each adding about the same small number: in bfloat16 the sum would stall long before the end.
    hidden = torch.ones(1, 2049, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, 2049, dtype=torch.int64)
    stats = linear_token_stats(hidden, weight, None, None, labels, needs=frozenset(), memory_mb=memory_mb)
    stats.policy_logps.sum().backward()
    # p = 1/4 everywhere, target 0: 2048 * (1 - 1/4) = 1536 for the target, -2048 / 4 = -512 for the others
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [1536.0, -512.0, -512.0, -512.0]


@pytest.mark.parametrize("multiplies", [True, False], ids=["has bfloat16 products", "has none"])
def test_half_precision_is_close_to_float32(multiplies, monkeypatch):
    monkeypatch.setattr(_scratch, "_multiplies", lambda dtype, device: multiplies)
    low = make(torch.bfloat16)
    high = [x.detach().float().requires_grad_(x.requires_grad) for x in low]
    gradients = []
    for hidden, weight, ref_hidden, ref_weight in (low, high):
        stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, memory_mb=3e-4)
        assert stats.policy_logps.dtype == stats.kl_ref_policy.dtype == torch.float32
        gradients.append((stats.policy_logps, *torch.autograd.grad(total(stats), (hidden, weight))))
    for ours, theirs in zip(*gradients, strict=True):
        # bfloat16 has 8 bits: logits of about 4 are rounded by up to 1/128
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()


class Watch(TorchDispatchMode):
    """Largest tensor that any operation returns, operations that were run, shapes of products, sizes of new memory."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operations = []
        self.products = []
        self.taken = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        if self.operations[-1] == "mm":
            self.products.append([tuple(factor.shape) for factor in args])
        if self.operations[-1] in ("new_empty", "empty"):
            self.taken.append(out.numel())
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_what_lives_from_block_to_block_is_one_piece_of_memory():
    # Many small tensors would cut holes that a CPU allocator has for the next block's logits.
    hidden, weight, ref_hidden, ref_weight = (x.detach().flatten(0, -2) for x in make(vocab=640))
    heads = Heads(hidden, weight, torch.arange(14), ref_hidden, ref_weight)
    blocks = Blocks(640, 64, kept=10, ref_kept=14)
    kept = Kept(hidden.new_empty(Kept.size(14, blocks)), 14, blocks)
    found = forward_blocks(heads, frozenset({"kl_ref_policy"}), blocks, kept)
    assert [len(shifts) for shifts in found.shifts] == [10, 10]
    assert len({shift.untyped_storage().data_ptr() for shifts in found.shifts for shift in shifts}) == 1
    # The largest of all columns so far, each in its own place.
    for shifts, (states, head) in zip(found.shifts, heads.pairs, strict=True):
        for number, shift in enumerate(shifts, 1):
            torch.testing.assert_close(shift, (states @ head[: 64 * number].T).amax(-1))


@pytest.mark.parametrize("needs", [frozenset({"ref"}), frozenset({"ref", "kl_ref_policy"}), ALL])
def test_logits_stay_within_the_budget_and_the_host_waits_for_places_alone(needs):
    batch, length, vocab, width, budget = 2, 64, 1001, 5, 100_000
    hidden = torch.randn(batch, length, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (batch, length))
    with Watch() as watch:
        stats = linear_token_stats(
            hidden,
            weight,
            hidden.detach() + 1,
            weight.detach(),
            labels,
            needs=needs,
            memory_mb=budget / 2**20,
        )
        total(stats).backward()
    assert watch.largest * 4 <= budget < batch * length * vocab * 4 / 5
    assert watch.operations.count("nonzero") == 1
    assert watch.operations.count("_local_scalar_dense") == 0


@pytest.mark.parametrize(
    ("rows", "vocabulary", "models", "keep", "budget"),
    [
        (3072, 32000, 1, 1, 512),
        (3072, 32000, 2, 1, 512),
        (3072, 32000, 2, 2, 320),
        (3072, 32000, 2, 2, 512),
        (2048, 128256, 1, 1, 800),
        (8192, 128256, 2, 2, 64),
        (1, 50, 1, 1, 1),
        (0, 50, 2, 2, 1),
    ],
)
def test_plans_fill_the_budget(rows, vocabulary, models, keep, budget):
    def plan(mebibytes):
        return plan_blocks(
            rows,
            vocabulary,
            models=models,
            keep=keep,
            dtype=torch.float32,
            device=torch.device("cpu"),
            budget=mebibytes * 2**20,
        )

    blocks = plan(budget)
    parts = list(blocks)
    assert parts[0].start == 0 and parts[-1].stop == vocabulary and len(parts) == len(blocks)
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    block, row = max(rows, 1) * blocks.columns * 4, vocabulary * 4
    left = budget * 2**20 - block * (models + 2 * (keep - 1)) - blocks.kept * block - blocks.ref_kept * row
    assert left >= 0
    assert blocks.kept == len(blocks) or left < block
    # The reference's come after all of the policy's.
    assert blocks.ref_kept == (keep - 1) * rows or (
        left < row if blocks.kept == len(blocks) else not blocks.ref_kept
    )
    whole = plan(1 << 20)
    assert (whole.kept, whole.ref_kept) == (len(whole), (keep - 1) * rows)
    assert len(blocks) == 1 or blocks.columns < 64 or blocks.columns % 64 == 0


@pytest.mark.parametrize("vocabulary", [1, 64, 65, 130, 1000])
@pytest.mark.parametrize("width", [1, 3, 8, 20, 64])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 40])
def test_a_blocks_gradient_is_written_where_nothing_is_left_to_read(rows, width, vocabulary):
    for budget in (rows * 4, rows * 20, rows * 512):
        blocks, alone = (
            plan_blocks(
                rows,
                vocabulary,
                models=1,
                keep=1,
                dtype=torch.float32,
                device=torch.device("cpu"),
                budget=budget,
                gradient=gradient,
            )
            for gradient in (width, 0)
        )
        assert list(blocks) == list(alone) and alone.lodged == 0
        # What the budget holds comes first, so that a head takes as much with few rows as with many.
        assert blocks.kept == alone.kept + blocks.lodged <= len(blocks)
        first = blocks.first_lodged_column
        for part in list(blocks)[len(blocks) - blocks.lodged :]:
            assert rows * (part.stop - first) <= part.start * width
        if rows <= width and vocabulary % blocks.columns == 0:
            assert blocks.kept >= len(blocks) - 1


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"ref", "kl_ref_policy"}), ALL])
@pytest.mark.parametrize("width", [2, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exponentials_lodge_in_the_heads_gradient_until_that_is_written(dtype, width, needs):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(size, width, generator=generator).to(dtype) for size in (9, 640, 9, 640)
    )
    targets = torch.arange(9)
    rounding = 1e-12 if dtype == torch.float64 else 0.005  # kept exponentials have the hidden states' digits

    def score(weight, **reference):
        # A block's logits are all that the budget holds, so that nothing is kept but in the gradient.
        at_work = (8 if dtype == torch.float64 else 4) * 9 * 64 * (4 if needs else 1)
        with Watch() as watch:
            values = score_tokens(
                hidden.requires_grad_(),
                weight.requires_grad_(),
                targets,
                needs=needs,
                memory_mb=at_work / 2**20 / (2 if needs else 1),
                **reference,
            )
            (node,) = {value.grad_fn for name, value in values.items() if name != "ref_logps"}
            lent = node.gradient
            total = values["policy_logps"].sum() + values.get("kl_ref_policy", torch.zeros(())).sum()
            gradients = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
            products = len(watch.products)
        assert node.gradient is None
        kept = [gradient.clone() for gradient in gradients]
        again = torch.autograd.grad(total, (hidden, weight))  # which finds nothing kept
        for first, second, copy in zip(gradients, again, kept, strict=True):
            assert (first - second).norm() <= rounding * second.norm()
            assert torch.equal(first, copy) and first.data_ptr() != second.data_ptr()
        return gradients, lent, products

    reference = {"ref_hidden": ref_hidden, "ref_head_weight": ref_weight} if needs else {}
    gradients, lent, products = score(weight, **reference)
    assert lent is not None and gradients[1].data_ptr() == lent.data_ptr()  # no copy of it was made
    # A head with gaps has no gradient of one piece, so all of it is computed again.
    apart = torch.empty(640, 2 * width, dtype=dtype)[:, :width].copy_(weight.detach())
    expected, none, more = score(apart, **reference)
    assert none is None and products < more
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= rounding * theirs.norm()


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"ref", "kl_ref_policy"})])
def test_logits_of_onednn_are_made_some_rows_at_a_time(monkeypatch, needs):
    # Its products make their own memory: blocks of it would lie elsewhere in the heap every time, which would grow by them.
    generator = torch.Generator().manual_seed(0)
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(size, 3, generator=generator) for size in (9, 640, 9, 640)
    )
    reference = {"ref_hidden": ref_hidden, "ref_head_weight": ref_weight} if needs else {}
    rows = []

    def by_rows(left, right, place=None):
        if right.shape[1] != 3:
            rows.append(left.shape[0])
        return left @ right

    def score(memory_mb):
        own = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = score_tokens(*own, torch.arange(9), needs=needs, memory_mb=memory_mb, **reference)
        total = values["policy_logps"].sum() + values.get("kl_ref_policy", torch.zeros(())).sum()
        return torch.autograd.grad(total, own)

    expected = score(64.0)
    monkeypatch.setattr(_scratch, "takes_onednn", lambda left, right: True)
    monkeypatch.setattr(_scratch, "_PLACE_BYTES", 1)
    monkeypatch.setattr(_scratch, "_FEWEST_ROWS", 4)
    monkeypatch.setattr(_scratch, "product", by_rows)
    gradients = score(0.02)
    assert rows and set(rows) == {3}  # nine rows in pieces of at most four, as equal as can be
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"ref", "kl_ref_policy"}), ALL])
def test_blocks_that_are_not_kept_are_made_where_others_are(needs, monkeypatch):
    # Before those in the forward, after them in the backward: a heap need not hold one more block, at two places.
    monkeypatch.setattr(_blocks, "_WIDEST", 64)
    hidden, weight, ref_hidden, ref_weight = (x.flatten(0, -2) for x in make(vocab=640))
    reference = {"ref_hidden": ref_hidden, "ref_head_weight": ref_weight} if needs else {}
    towards = torch.arange(14) - 4.0

    def score(blocks):
        """Gradients with a budget of so many blocks of 64 columns, and the blocks that were taken from the allocator."""
        models = 2 if needs else 1
        with Watch() as watch:
            values = score_tokens(
                hidden,
                weight,
                torch.arange(14),
                needs=needs,
                memory_mb=blocks * 14 * 64 * 8 / 2**20 / models,
                **reference,
            )
            wanted = sum((value * towards).sum() for value in values.values() if value.requires_grad)
            gradients = torch.autograd.grad(wanted, (hidden, weight), retain_graph=True)
        assert_same(torch.autograd.grad(wanted, (hidden, weight)), gradients)
        return gradients, watch.taken.count(14 * 64)

    expected, _ = score(100)
    at_work = 4 if needs else 1
    without, most = score(at_work)
    assert_same(without, expected)
    for kept in (2, 5):
        gradients, taken = score(at_work + kept)
        assert_same(gradients, expected)
        # The forward's and the backward's; with a KL the latter wants one for the kept blocks too.
        assert most - taken == (1 if needs else 2)


def test_targets_of_one_word_are_rounded_together():
    # In bfloat16 neighbours of 256 are 2 apart: 0.75 alone is lost, 1.5 is more than half of the way.
    total = torch.tensor([[1.0], [256.0], [256.0]], dtype=torch.bfloat16)
    _add_rounded(total, torch.tensor([1, 1, 2]), torch.full((3, 1), 0.75))
    assert total.flatten().tolist() == [1.0, 258.0, 256.0]


def test_score_tokens_gives_rows():
    hidden, weight, ref_hidden, ref_weight = make()
    targets = torch.tensor([3, 0, 6])
    rows = score_tokens(
        hidden[0, :3], weight, targets, ref_hidden=ref_hidden[0, :3], ref_head_weight=ref_weight, needs=ALL
    )
    assert set(rows) == {"policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"}
    log_p = (hidden[0, :3] @ weight.T).log_softmax(-1)
    torch.testing.assert_close(rows["policy_logps"], log_p[[0, 1, 2], targets], atol=1e-12, rtol=0)
    assert set(score_tokens(hidden[0, :3], weight, targets)) == {"policy_logps"}


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"kl_ref_policy"})])
@pytest.mark.parametrize("memory_mb", [1e-4, 100])
def test_calls_that_share_a_head_add_their_gradients_of_it(memory_mb, needs):
    hidden, weight, ref_hidden, ref_weight = make()
    targets = torch.tensor([3, 1, 4, 1, 5])
    rows, ref_rows = hidden.detach().flatten(0, 1)[:5], ref_hidden.flatten(0, 1)[:5]

    def score(part, **options):
        values = score_tokens(
            rows[part].requires_grad_(),
            weight,
            targets[part],
            ref_hidden=ref_rows[part] if needs else None,
            ref_head_weight=ref_weight,
            needs=needs,
            memory_mb=memory_mb,
            **options,
        )
        return sum(value.sum() for value in values.values())

    (wanted,) = torch.autograd.grad(score(slice(0, 5)), weight)
    together = torch.zeros_like(weight)
    for part in (slice(0, 2), slice(2, 5)):
        before = together.clone()
        score(part, add_to=together).backward()
        assert not torch.equal(before, together)
    torch.testing.assert_close(together, wanted, atol=1e-12, rtol=0)
    assert weight.grad is None


def test_a_place_for_the_heads_gradient_must_take_it_without_rounding():
    rows, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    with pytest.raises(ValueError, match=r"add_to must have the shape \[5, 4\] of head_weight, got \[4, 5\]"):
        score_tokens(rows, weight, targets, add_to=torch.zeros(4, 5))
    for dtypes in ((torch.bfloat16,) * 3, (torch.float32, torch.float32, torch.float64)):
        tensors = [t.to(dtype) for t, dtype in zip((rows, weight, weight), dtypes, strict=True)]
        with pytest.raises(ValueError, match="add_to needs hidden states, head and itself in float32"):
            score_tokens(tensors[0], tensors[1], targets, add_to=tensors[2])


def test_score_tokens_checks_its_arguments():
    hidden, weight, ref_hidden, ref_weight = make()
    rows, targets = hidden[0, :3], torch.tensor([3, 0, 6])
    with pytest.raises(ValueError, match=r"\['ref'\]"):
        score_tokens(rows, weight, targets, needs={"ref"})
    with pytest.raises(ValueError, match="without ref_head_weight"):
        score_tokens(rows, weight, targets, ref_hidden=ref_hidden[0, :3], needs={"ref"})
    with pytest.raises(ValueError, match=r"must agree in D, got \[3, 4\] and \[7, 3\]"):
        score_tokens(rows, ref_weight, targets)
    with pytest.raises(ValueError, match="hidden has 3 rows for 2 targets"):
        score_tokens(rows, weight, targets[:2])
    with pytest.raises(ValueError, match="differ in vocabulary: head_weight has 7 rows, ref_head_weight 6"):
        score_tokens(
            rows, weight, targets, ref_hidden=ref_hidden[0, :3], ref_head_weight=ref_weight[:6], needs={"ref"}
        )
    with pytest.raises(ValueError, match="memory_mb must be a number above 0, got 0"):
        score_tokens(rows, weight, targets, memory_mb=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    results = []
    for device in ("cpu", "cuda"):
        tensors = [x.detach().to(device).requires_grad_(x.requires_grad) for x in make(dtype)]
        stats = linear_token_stats(*tensors, LABELS.to(device), needs=ALL, memory_mb=3e-4)
        results.append([g.float().cpu() for g in torch.autograd.grad(total(stats), tensors[:2])])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 0.03) * theirs.norm()


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"kl_ref_policy"}), frozenset({"entropy"})])
def test_rows_in_pieces_have_the_gradients_of_all_at_once(needs, monkeypatch):
    """What the backward makes of the hidden states does not grow with their number: it takes some rows at a time."""
    random = torch.Generator().manual_seed(3)

    def make(*size):
        return torch.randn(size, dtype=torch.float64, generator=random)

    hidden, weight = make(11, 6).requires_grad_(), make(130, 6).requires_grad_()
    targets = torch.randint(0, 130, (11,), generator=random)
    own = {"ref_hidden": make(11, 5), "ref_head_weight": make(130, 5)} if "kl_ref_policy" in needs else {}
    towards = make(11)

    def gradients():
        values = score_tokens(hidden, weight, targets, needs=needs, memory_mb=0.03, **own)
        total = sum((value * towards).sum() for value in values.values() if value.requires_grad)
        return torch.autograd.grad(total, (hidden, weight))

    expected = gradients()
    monkeypatch.setattr(_scratch, "_PLACE_BYTES", 8 * 6 * 4)
    monkeypatch.setattr(_scratch, "_FEWEST_ROWS", 2)
    assert_same(gradients(), expected)
