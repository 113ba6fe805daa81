r"""Score every answer token of a data set and write a weight store, for ``recipes/tis_dpo_distributed``.

    tune run recipes/estimate_weights_distributed --config smollm2/135M_estimate_weights
    tune run --nproc_per_node 8 recipes/estimate_weights_distributed --config llama3_2/1B_estimate_weights batch_tokens=32768

The estimator is a component: ``ContrastiveEstimator`` takes log pi+ - log pi- from a pair that
``recipes/contrastive_reference_distributed`` built. Raw scores are stored; transforms run when they are loaded. Run again with
the same config it goes on after the last whole shard. ``tokenpref show-weights`` shows single rows.
"""

import sys

from omegaconf import DictConfig

from tokenpref.training import WeightEstimation, recipe_main


@recipe_main
def main(cfg: DictConfig) -> None:
    """Run, and leave the process group whatever happens."""
    estimation = WeightEstimation(cfg)
    try:
        estimation.run()
    finally:
        estimation.close()


if __name__ == "__main__":
    sys.exit(main())
