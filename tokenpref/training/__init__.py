"""Config, step, loop, evaluation and sampling: what the recipes stand on."""

from tokenpref.training.cli import recipe_main
from tokenpref.training.evaluator import Evaluator
from tokenpref.training.schedule import get_constant_schedule_with_warmup
from tokenpref.training.trainer import PreferenceTrainer

__all__ = ["Evaluator", "PreferenceTrainer", "get_constant_schedule_with_warmup", "recipe_main"]
