r"""Evaluate a model on held-out pairs and on samples of its own.

    tune run recipes/evaluate_distributed --config smollm2/135M_evaluate \
        checkpointer.checkpoint_dir=outputs/smollm2_135M_tdpo/epoch_0 output_dir=outputs/evaluation

Writes ``evaluation.json`` and ``samples.jsonl`` to ``output_dir``. With ``sampling.compare_to=.../samples.jsonl`` the
gain in reward over another model is paired sample by sample.
"""

import sys

from omegaconf import DictConfig

from tokenpref.training import Evaluator, recipe_main


@recipe_main
def main(cfg: DictConfig) -> None:
    """Evaluate, and leave the process group whatever happens."""
    evaluator = Evaluator(cfg)
    try:
        evaluator.run()
    finally:
        evaluator.close()


if __name__ == "__main__":
    sys.exit(main())
