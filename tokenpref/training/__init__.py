"""Config, step, loop, evaluation and sampling: what the recipes stand on."""

from tokenpref.training.credit.anchors import AnchorSampler
from tokenpref.training.credit.attribution import Attribution
from tokenpref.training.credit.prompts import OnlinePrompts
from tokenpref.training.credit.sources import Source, SourceContext, anchors, token_weights
from tokenpref.training.estimation.estimators import AttributionEstimator, ContrastiveEstimator, OnlinePair
from tokenpref.training.estimation.pair_builder import ContrastiveReference
from tokenpref.training.estimation.weight_estimation import WeightEstimation
from tokenpref.training.evaluation.evaluator import Evaluator
from tokenpref.training.recipe import recipe_main
from tokenpref.training.schedule import get_constant_schedule_with_warmup
from tokenpref.training.trainer import PreferenceTrainer, TripletTrainer, WeightedTrainer

__all__ = [
    "AnchorSampler",
    "Attribution",
    "AttributionEstimator",
    "ContrastiveEstimator",
    "ContrastiveReference",
    "Evaluator",
    "OnlinePair",
    "OnlinePrompts",
    "PreferenceTrainer",
    "Source",
    "SourceContext",
    "TripletTrainer",
    "WeightEstimation",
    "WeightedTrainer",
    "anchors",
    "get_constant_schedule_with_warmup",
    "recipe_main",
    "token_weights",
]
