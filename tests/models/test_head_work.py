import weakref

import pytest
import torch
from support import small
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpref.losses import DPOLoss, NLLLoss, TISDPOLoss, TokenDPOLoss, TripletTIDPOLoss
from tokenpref.models.head_work import Head, HeadWork, loss_by_groups
from tokenpref.models.scoring import ScoringModel
from tokenpref.ops import HeadRoom
from tokenpref.stats import split_pair

ROWS = [0, 1, 2, 3, 4]
BATCH = small.batch(ROWS)
SIZES = [int(n) for n in (BATCH.labels != -100).view(2, len(ROWS), -1).sum((0, 2))]
MIB = 2**20


def memory_for(rows):
    """A budget in MiB that holds the float64 logits of so many rows twice: at work, and kept."""
    return 2 * rows * small.VOCAB * 8 / MIB


def work_of(batch, needs=frozenset(), **more):
    return HeadWork(batch.labels, needs, sides=len(batch.sides), **more)


def groups(memory_mb, dtype=torch.float64, batch=BATCH):
    work = work_of(batch)
    hidden = torch.zeros(work.rows.index.numel(), 4, dtype=dtype)
    head = Head(torch.zeros(small.VOCAB, 4, dtype=dtype), memory_mb, HeadRoom())
    return [(group.start, group.stop) for group in work.groups(hidden, head)]


def test_groups_are_as_few_as_the_memory_holds():
    assert SIZES == [6, 12, 6, 12, 6]
    assert groups(100) == [(0, 5)]
    assert groups(memory_for(18)) == [(0, 2), (2, 4), (4, 5)]
    assert groups(memory_for(28)) == [(0, 3), (3, 5)]
    assert groups(memory_for(1)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], "a pair is never cut"


def test_a_rounded_gradient_is_not_summed_over_groups():
    assert groups(memory_for(1), torch.bfloat16) == [(0, 5)]
    assert len(groups(memory_for(1), torch.float32)) == 5


def test_a_filler_is_a_group():
    assert groups(memory_for(1), batch=small.batch([], filler=True)) == [(0, 1)]


def gradients(loss, memory_mb, *, tied=True, frozen=(), batch=BATCH, padding_free=True):
    """The sum of a loss over the pairs, the gradients of all parameters, and how many groups there were."""
    model = small.decoder(0, tied=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    scorer = ScoringModel(model, head_memory_mb=memory_mb, padding_free=padding_free)
    weights = torch.rand(
        batch.labels.shape[0], batch.labels.shape[1] - 1, generator=torch.Generator().manual_seed(0)
    )
    calls = []
    with small.reference(1).outputs(batch, loss.needs) as ref:
        work = work_of(
            batch,
            loss.needs,
            ref_logps=ref.logps,
            ref_hidden=ref.hidden,
            ref_head_weight=ref.head_weight,
            weights=weights,
        )

        def add(stats, pairs):
            calls.append(pairs)
            return loss(split_pair(stats, batch.sides)).losses.sum() * 0.25

        total = scorer.pairs_loss(batch.tokens, work, add)
        total.backward()
    assert [pairs.start for pairs in calls] == [0, *(pairs.stop for pairs in calls[:-1])]
    return total.detach(), {n: p.grad for n, p in model.named_parameters()}, len(calls)


def assert_alike(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=1e-12, rtol=0)
    for name, gradient in wanted[1].items():
        if gradient is None:
            assert found[1][name] is None, name
        else:
            torch.testing.assert_close(found[1][name], gradient, atol=1e-12, rtol=1e-9, msg=name)


ANCHORED = BATCH.with_anchors(small.anchors(BATCH))


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (DPOLoss(), BATCH),
        (TISDPOLoss(), BATCH),
        (TokenDPOLoss(), BATCH),
        (TokenDPOLoss(variant="tdpo1"), BATCH),
        (NLLLoss("rejected"), BATCH.only("rejected")),
        (TripletTIDPOLoss(gamma=0.5), ANCHORED),
    ],
    ids=["dpo", "tis", "tdpo2", "tdpo1", "one-side", "triplet"],
)
def test_groups_have_the_loss_and_gradients_of_all_pairs_at_once(loss, batch, tied, padding_free):
    whole = gradients(loss, 100, tied=tied, batch=batch, padding_free=padding_free)
    assert whole[2] == 1
    rows = int((batch.labels != -100).sum())
    counts = []
    for memory_mb in (memory_for(1), memory_for(0.7 * rows)):
        found = gradients(loss, memory_mb, tied=tied, batch=batch, padding_free=padding_free)
        counts.append(found[2])
        assert_alike(found, whole)
    assert counts[0] == 5 > counts[1] > 1


@pytest.mark.parametrize("frozen", [("output",), ("tok_embeddings", "layers", "norm")], ids=["head", "body"])
def test_what_is_frozen_gets_no_gradient(frozen):
    found, whole = (gradients(DPOLoss(), mb, tied=False, frozen=frozen) for mb in (memory_for(1), 100))
    # Groups make gradients of hidden states, which a frozen body has no use for.
    assert found[2] == (5 if "output" in frozen else 1)
    assert {name for name, gradient in found[1].items() if gradient is None} == {
        name for name in found[1] if any(part in name for part in frozen)
    }
    assert_alike(found, whole)


def plain_head(memory_mb):
    """Rows, a head and what makes a DPO loss of them, without a decoder."""
    generator = torch.Generator().manual_seed(1)
    count = int((BATCH.labels != -100).sum())
    hidden = torch.randn(count, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(small.VOCAB, 16, generator=generator, dtype=torch.float64).requires_grad_()
    work = work_of(BATCH, ref_logps=torch.zeros(BATCH.labels[:, 1:].shape, dtype=torch.float64))

    def loss(stats, _pairs):
        return DPOLoss()(split_pair(stats)).losses.sum()

    return hidden, weight, lambda: loss_by_groups(work, hidden, Head(weight, memory_mb, HeadRoom()), loss)


class Products(TorchDispatchMode):
    """Multiplications of all matrix products."""

    def __init__(self):
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm_"):
            left, right = args[-2:]
            self.multiplications += left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_no_product_is_made_twice():
    # A group's memory holds a pair; the whole micro-batch in the same memory would compute most of it again.
    hidden, weight, run = plain_head(memory_for(12))
    with Products() as products:
        run().backward()
    assert products.multiplications == 3 * hidden.numel() * weight.shape[0]


def test_a_loss_goes_back_once():
    _, _, run = plain_head(memory_for(12))
    loss = run()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was gone back from before"):
        loss.backward()


def test_nothing_of_a_group_is_left_when_the_next_begins():
    class OtherDevices(HeadRoom):
        """Keeps nothing itself, as for devices whose allocators do that."""

        def __init__(self):
            super().__init__()
            self.loans = []

        def lend(self, size, like):
            loan = super().lend(size, like)
            self.loans.append(weakref.ref(loan))
            return loan

        def take_back(self, loan):
            pass

    scorer = small.scorer(0)
    scorer.head_memory_mb, scorer._room = memory_for(12), OtherDevices()
    alive = []

    def watched(stats, _pairs):
        alive.append([loan() is not None for loan in scorer._room.loans])
        return stats.policy_logps.sum()

    scorer.pairs_loss(BATCH.tokens, work_of(BATCH), watched).backward()
    assert len(alive) > 2
    assert alive == [[False] * group + [True] for group in range(len(alive))]


def test_without_gradient_there_is_the_loss_alone():
    _, _, run = plain_head(memory_for(12))
    wanted = run()
    with torch.no_grad():
        found = run()
    assert not found.requires_grad and torch.equal(found, wanted)


def test_pairs_without_gradient_leave_the_others_theirs():
    scorer, together = small.scorer(0), small.scorer(0)

    def every_other(stats, pairs):
        # The first group is one of those without.
        if pairs.stop - pairs.start == 1:
            return stats.policy_logps.sum() if pairs.start % 2 else torch.tensor(1.0)
        return stats.policy_logps.view(2, 5, -1)[:, 1::2].sum() + 3.0

    scorer.pairs_loss(BATCH.tokens, work_of(BATCH), every_other).backward()
    together.pairs_loss(BATCH.tokens, work_of(BATCH), every_other, together=True).backward()
    for one, other in zip(scorer.model.parameters(), together.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-9)


def test_what_comes_after_the_loss_reaches_the_gradient():
    hidden, weight, run = plain_head(memory_for(12))
    plain = torch.autograd.grad(run(), (hidden, weight))
    scaled = torch.autograd.grad(run() * -3, (hidden, weight))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one * -3, other, atol=0, rtol=0)


def test_equal_models_say_the_same_bit_for_bit_in_groups():
    policy, reference = small.scorer(0), small.reference(0)
    seen = []

    def add(stats, _pairs):
        seen.append((stats.policy_logps - stats.require("ref")).abs().max())
        return stats.policy_logps.sum()

    with reference.outputs(BATCH, frozenset({"ref"})) as ref:
        policy.pairs_loss(BATCH.tokens, work_of(BATCH, frozenset({"ref"}), ref_logps=ref.logps), add)
        with torch.no_grad():
            alone = policy.logps(BATCH.tokens, BATCH.labels, sides=2)
    assert len(seen) > 1 and all(gap == 0 for gap in seen)
    assert torch.equal(alone, ref.logps)
