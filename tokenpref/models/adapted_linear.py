"""A linear layer with an adapter, as a model has it and as transformers names it on disk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LLAMA_LIKE", "AdaptedLinear", "to_interleaved"]

LLAMA_LIKE = ("llama", "mistral", "gemma", "gemma2")
"""The values of ``model_type`` for which torchtune writes the rows of ``B`` in the order of transformers."""


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer with an adapter.

    Args:
        name: its name in the model, such as ``layers.0.attn.q_proj``.
        hf_name: its name in transformers, such as ``model.layers.0.self_attn.q_proj``.
        in_dim: size of its input.
        out_dim: size of its output.
        heads: heads whose rows are in another order in transformers; None if the order is the same.
        bias: whether it has a bias.
    """

    name: str
    hf_name: str
    in_dim: int
    out_dim: int
    heads: int | None = None
    bias: bool = False

    def shapes(self, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's tensors, by torchtune's names within the layer."""
        shapes: dict[str, tuple[int, ...]] = {
            "lora_a.weight": (rank, self.in_dim),
            "lora_b.weight": (self.out_dim, rank),
        }
        return {**shapes, "magnitude": (self.out_dim,)} if dora else shapes

    def to_hf_order(self, part: str, tensor: Tensor) -> Tensor:
        """A tensor of the adapter with its output rows in transformers' order."""
        if self.heads is None or part == "lora_a.weight":
            return tensor
        return tensor.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def from_hf_order(self, part: str, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`to_hf_order`."""
        return tensor if self.heads is None or part == "lora_a.weight" else to_interleaved(tensor, self.heads)


def to_interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (0, 0, ..., 1, 1, ...) to interleaved rotary pairs (0, 1, 0, 1, ...)."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
