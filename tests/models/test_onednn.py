"""Products by oneDNN are the same products, taken where a processor is faster with them and nowhere else."""

import pytest
import torch
from support.onednn import needs_onednn

from tokenpref.models import cpu
from tokenpref.ops import score_tokens
from tokenpref.ops.products import add_product, product

pytestmark = needs_onednn


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layouts(*shape):
    """A matrix, a transpose and a part of a wider one, of the same numbers."""
    values = normal(*shape)
    wider = torch.zeros(shape[0], shape[1] + 3)
    wider[:, 1:-2] = values
    return [values, values.T.contiguous().T, wider[:, 1:-2]]


def test_products_of_all_layouts(onednn):
    for left in layouts(7, 5):
        for right in layouts(5, 9):
            wanted = left.double() @ right.double()
            torch.testing.assert_close(product(left, right).double(), wanted, atol=1e-5, rtol=0)
            for begun in (False, True):
                # What a total that has not begun holds must not matter.
                total = torch.ones(7, 9) if begun else torch.full((7, 9), torch.nan)
                assert add_product(total, left, right, begun=begun) is total
                torch.testing.assert_close(total.double(), wanted + begun, atol=1e-5, rtol=0)
    assert len(onednn) == 3 * 3 * 3


def test_what_is_added_is_made_of_some_rows_at_a_time(onednn, monkeypatch):
    monkeypatch.setattr(cpu, "_AT_A_TIME", 30)
    for left, parts in ((normal(5, 17).T, [(3, 5)] * 5 + [(2, 5)]), (normal(17, 5), None)):
        right, total = normal(5, 9), torch.ones(17, 9)
        onednn.clear()
        add_product(total, left, right)
        torch.testing.assert_close(total, 1 + left @ right, atol=1e-5, rtol=0)
        found = [shapes[1] for shapes in onednn] if parts else [shapes[0] for shapes in onednn]
        assert found == (parts or [(3, 5)] * 5 + [(2, 5)])


def test_a_weight_with_gaps_is_copied_first(monkeypatch):
    """oneDNN reads it number by number: a product of 20 ms took minutes."""
    taken, library = [], torch.ops.mkldnn._linear_pointwise

    def watched(x, weight, *rest):
        taken.append(weight.is_contiguous() or weight.T.is_contiguous())
        return library(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    for weight in (*layouts(9, 8), *(other.T for other in layouts(8, 9))):
        found = cpu.OneDNN._by_weight(normal(4, 8), weight)
        torch.testing.assert_close(found, normal(4, 8) @ weight.T, atol=1e-5, rtol=0)
    assert taken == [True] * 6


def test_of_two_factors_to_copy_the_smaller_is_turned(onednn):
    add_product(torch.zeros(7, 9), normal(5, 7).T, normal(5, 9))
    add_product(torch.zeros(9, 7), normal(5, 9).T, normal(5, 7))
    add_product(torch.zeros(9, 7), normal(9, 5), normal(5, 7))
    assert onednn == [((7, 5), (9, 5)), ((7, 5), (9, 5)), ((9, 5), (7, 5))]


def test_a_row_does_not_depend_on_the_rows_beside_it(onednn):
    x, weight = normal(600, 64), normal(96, 64)
    whole = product(x, weight.T)
    for rows in (slice(0, 512), slice(512, 600), slice(3, 5), slice(100, 333)):
        assert torch.equal(product(x[rows], weight.T), whole[rows])
    assert len(onednn) == 5


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (normal(1, 8), normal(9, 8)),  # one row alone
        (normal(0, 8), normal(9, 8)),
        (normal(4, 8).double(), normal(9, 8).double()),
        (normal(4, 8).bfloat16(), normal(9, 8).bfloat16()),
        (normal(4, 8).to("meta"), normal(9, 8).to("meta")),
    ],
)
def test_what_oneDNN_is_not_asked(onednn, left, right):
    found = product(left, right.T)
    assert found.shape == (left.shape[0], 9) and not onednn
    if left.device.type == "cpu":
        assert torch.equal(found, left @ right.T)
        assert torch.equal(add_product(torch.zeros_like(found), left, right.T), left @ right.T)


def test_small_products_stay():
    library = cpu.OneDNN()
    assert not library.takes(normal(500, 64), normal(64, 64))
    assert library.takes(normal(2, 128), normal(128, 128))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not library.takes(normal(2, 128), normal(128, 128))


@pytest.mark.parametrize(
    ("vendor", "vectors", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_which_processors(monkeypatch, vendor, vectors, faster):
    monkeypatch.setattr(cpu, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu.uses_onednn.__wrapped__() is faster


def test_the_vendor_is_the_kernels_word(tmp_path):
    about = tmp_path / "cpuinfo"
    assert cpu._vendor(about) == ""
    about.write_text("processor\t: 0\n")
    assert cpu._vendor(about) == ""
    about.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n\nprocessor\t: 1\nvendor_id\t: Other\n"
    )
    assert cpu._vendor(about) == "AuthenticAMD"


@pytest.mark.parametrize("memory_mb", [0.01, 100])
@pytest.mark.parametrize(
    "needs", [frozenset(), frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_heads_statistics_and_gradients(onednn, memory_mb, needs, frozen):
    def scored(dtype):
        hidden, weight = normal(40, 16).to(dtype).requires_grad_(), normal(90, 16).to(dtype)
        weight.requires_grad_(not frozen)
        values = score_tokens(
            hidden,
            weight,
            torch.arange(40) * 2,
            ref_hidden=normal(40, 17)[:, 1:].to(dtype),
            ref_head_weight=normal(91, 16)[1:].to(dtype),
            needs=needs,
            memory_mb=memory_mb,
        )
        total = sum((value * torch.linspace(-1, 1, 40).to(dtype)).sum() for value in values.values())
        return [*values.values(), *torch.autograd.grad(total, [hidden] if frozen else [hidden, weight])]

    found = scored(torch.float32)
    assert onednn
    made = len(onednn)
    for one, other in zip(found, scored(torch.float64), strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-4, rtol=1e-4)
    assert len(onednn) == made
