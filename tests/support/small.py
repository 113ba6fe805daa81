"""Small random decoders and pair batches."""

from __future__ import annotations

import torch

from tokenpref._torchtune import TransformerDecoder, llama3_2, lora_llama3_2
from tokenpref.data import AnchorBatch, Answer, PairBatch, PairExample, collate_anchors
from tokenpref.models.adapters import adapter_names, initial_adapters
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.weights import TransformedWeights

VOCAB = 61


def decoder(seed: int = 0, *, tied: bool = True, dtype: torch.dtype = torch.float64) -> TransformerDecoder:
    """Two layers of width 32, with weights large enough for logits that differ."""
    generator = torch.Generator().manual_seed(seed)
    model = llama3_2(
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=48,
        tie_word_embeddings=tied,
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.15, generator=generator)
    return model.to(dtype)


def lora_decoder(
    seed: int = 0,
    *,
    dora: bool = False,
    mlp: bool = True,
    new: bool = False,
    dtype: torch.dtype = torch.float64,
) -> TransformerDecoder:
    """:func:`decoder` with adapters of rank 4 on queries, values and the MLP; its base is frozen.

    Args:
        seed: of the base, which equals that of :func:`decoder`.
        dora: DoRA instead of LoRA.
        mlp: whether the MLP has adapters too.
        new: as they are first; else A and B are random, and so large that they matter.
        dtype: of all weights.
    """
    base = decoder(seed, dtype=dtype).state_dict()
    model = lora_llama3_2(
        ["q_proj", "v_proj"],
        mlp,
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=48,
        lora_rank=4,
        lora_alpha=8,
        use_dora=dora,
    ).to(dtype)
    adapters = initial_adapters(model, base, seed=3, compute_dtype=dtype, device=torch.device("cpu"))
    if not new:
        generator = torch.Generator().manual_seed(100 + seed)
        for name, tensor in adapters.items():
            noise = torch.randn(tensor.shape, generator=generator)
            adapters[name] = tensor * (1 + 0.1 * noise) if "magnitude" in name else 0.1 * noise
    model.load_state_dict({**base, **adapters})
    trained = set(adapter_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def nf4_llama(use_dora: bool = False) -> TransformerDecoder:
    """A decoder with an NF4 base and adapters: the smallest of which two ranks can share the groups of NF4."""
    return lora_llama3_2(
        ["q_proj", "v_proj"],
        True,
        vocab_size=384,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        embed_dim=256,
        max_seq_len=128,
        intermediate_dim=256,
        scale_factor=1,
        lora_rank=4,
        lora_alpha=8,
        use_dora=use_dora,
        quantize_base=True,
    )


def scorer(seed: int = 0, *, tied: bool = True, frozen: bool = False, **kwargs: object) -> ScoringModel:
    """A scoring model over :func:`decoder`."""
    model = decoder(seed, tied=tied, **kwargs)  # type: ignore[arg-type]
    model.requires_grad_(not frozen)
    return ScoringModel(model, head_memory_mb=0.002)


def reference(seed: int = 1, **kwargs: object) -> FrozenReference:
    """A frozen reference with weights of its own."""
    return FrozenReference(scorer(seed, frozen=True, **kwargs))  # type: ignore[arg-type]


def batch(rows: list[int], *, length: int = 12, filler: bool = False) -> PairBatch:
    """Pairs that depend on their row numbers alone, of uneven lengths; or one filler pair."""
    if filler:
        return PairBatch(
            tokens=torch.zeros(2, 2, dtype=torch.long),
            labels=torch.full((2, 2), -100),
            real=torch.tensor([False]),
            rows=[-1],
            num_pairs=0,
            num_tokens=0,
        )
    sides: list[list[torch.Tensor]] = [[], []]
    labels: list[list[torch.Tensor]] = [[], []]
    count = 0
    for row in rows:
        generator = torch.Generator().manual_seed(1000 + row)
        prompt = torch.randint(1, VOCAB, (3 + row % 2,), generator=generator)
        for side in range(2):
            answer = torch.randint(1, VOCAB, (2 + (row * 3 + side * 2) % 6,), generator=generator)
            ids = torch.cat([prompt, answer])
            count += len(ids)
            pad = length - len(ids)
            sides[side].append(torch.nn.functional.pad(ids, (0, pad)))
            masked = torch.cat([torch.full_like(prompt, -100), answer])
            labels[side].append(torch.nn.functional.pad(masked, (0, pad), value=-100))
    return PairBatch(
        tokens=torch.stack(sides[0] + sides[1]),
        labels=torch.stack(labels[0] + labels[1]),
        real=torch.ones(len(rows), dtype=torch.bool),
        rows=list(rows),
        num_pairs=len(rows),
        num_tokens=count,
    )


def example(row: int) -> PairExample:
    """The pair of :func:`batch` as the data set has it."""
    pairs = batch([row])
    sides = []
    for tokens, labels in zip(pairs.tokens, pairs.labels, strict=True):
        answer = (labels != -100).nonzero().flatten().tolist()
        sides.append((tokens[: answer[-1] + 1].tolist(), answer[0]))
    (chosen, chosen_start), (rejected, rejected_start) = sides
    return PairExample(
        row=row,
        chosen_ids=chosen,
        chosen_start=chosen_start,
        rejected_ids=rejected,
        rejected_start=rejected_start,
        chosen_offsets=[],
        rejected_offsets=[],
        chosen_has_eos=False,
        rejected_has_eos=False,
        key="",
    )


def anchor(row: int) -> Answer | None:
    """A third answer that depends on the row alone; one in three is empty, a filler has none."""
    if row < 0:
        return None
    generator = torch.Generator().manual_seed(2000 + row)
    prompt = 3 + row % 2
    return torch.randint(1, VOCAB, (prompt + row * 5 % 3 * 2,), generator=generator).tolist(), prompt


def anchors(pairs: PairBatch) -> AnchorBatch:
    """:func:`anchor` of a batch's rows."""
    return collate_anchors([anchor(row) for row in pairs.rows], pairs, pad_id=0)


def weights(pairs: PairBatch) -> TransformedWeights:
    """Weights that depend on the token ids alone."""
    mask = pairs.labels[:, 1:] != -100
    values = 0.5 + (pairs.tokens[:, 1:] % 5).double() / 4.0
    return TransformedWeights(torch.where(mask, values, 0), torch.zeros_like(mask))
