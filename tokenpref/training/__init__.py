"""Config, step, loop, evaluation and sampling: what the recipes stand on."""

from tokenpref.training.anchors import AnchorSampler
from tokenpref.training.attribution import Attribution, AttributionEstimator
from tokenpref.training.contrastive_reference import ContrastiveReference
from tokenpref.training.estimate import ContrastiveEstimator, WeightEstimation
from tokenpref.training.evaluation.evaluator import Evaluator
from tokenpref.training.online import OnlinePrompts
from tokenpref.training.recipe import recipe_main
from tokenpref.training.schedule import get_constant_schedule_with_warmup
from tokenpref.training.trainer import PreferenceTrainer
from tokenpref.training.triplet import TripletTrainer
from tokenpref.training.weighted import WeightedTrainer

__all__ = [
    "AnchorSampler",
    "Attribution",
    "AttributionEstimator",
    "ContrastiveEstimator",
    "ContrastiveReference",
    "Evaluator",
    "OnlinePrompts",
    "PreferenceTrainer",
    "TripletTrainer",
    "WeightEstimation",
    "WeightedTrainer",
    "get_constant_schedule_with_warmup",
    "recipe_main",
]
