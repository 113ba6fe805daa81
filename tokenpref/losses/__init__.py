"""Losses on token statistics: :class:`~tokenpref.stats.PairStats` in, :class:`~tokenpref.stats.LossOutput` out.

A loss of your own needs no base class: an ``nn.Module`` with ``needs`` (a frozenset of names, see
:data:`tokenpref.stats.NEEDS`) and ``forward(pair) -> LossOutput``. :class:`Loss` says what the trainer asks of it, and
:class:`LossTraits` what it may say beyond that. :class:`PreferenceLoss` saves writing the rest.
"""

from __future__ import annotations

from tokenpref.losses._base import INVARIANTS, Centring, Loss, LossTraits, PreferenceLoss
from tokenpref.losses.dpo import DPOLoss
from tokenpref.losses.sft import NLLLoss
from tokenpref.losses.tdpo import TokenDPOLoss
from tokenpref.losses.ti_dpo import TripletTIDPOLoss
from tokenpref.losses.tis_dpo import TISDPOLoss

__all__ = [
    "INVARIANTS",
    "Centring",
    "DPOLoss",
    "Loss",
    "LossTraits",
    "NLLLoss",
    "PreferenceLoss",
    "TISDPOLoss",
    "TokenDPOLoss",
    "TripletTIDPOLoss",
]
