"""Looks at a model as a :class:`~tokenpref.models.decoder.Decoder`."""

from __future__ import annotations

from torch import nn

from tokenpref._torchtune import TransformerDecoder
from tokenpref.models.decoder import Decoder
from tokenpref.models.torchtune_decoder import TorchtuneDecoder

__all__ = ["decoder_of"]


def decoder_of(module: nn.Module) -> Decoder:
    """A model as a :class:`Decoder`.

    Args:
        module: torchtune's ``TransformerDecoder``, or a causal LM of transformers; sharded or not.

    Raises:
        TypeError: for any other module.
    """
    if isinstance(module, TransformerDecoder):
        return TorchtuneDecoder(module)
    # Imported late, because transformers takes seconds to import.
    from tokenpref.models.transformers_decoder import TransformersDecoder

    return TransformersDecoder(module)
