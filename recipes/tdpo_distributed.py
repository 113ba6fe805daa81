"""Preference training with per-token statistics: TDPO1, TDPO2, and plain DPO as their special case.

One process, or many under FSDP2, on CPU or GPU:

    tune run recipes/tdpo_distributed --config smollm2/135M_tdpo loss.beta=0.2
    tune run --nproc_per_node 8 recipes/tdpo_distributed --config llama3_2/1B_tdpo

To make your own: ``tune cp recipes/tdpo_distributed my_tdpo.py``, attach sources of statistics to the trainer below or derive
from it, and ``tune run my_tdpo.py --config my.yaml``. A loss of your own needs no copy: ``loss._component_=my_loss.MyLoss``.
"""

import sys

from omegaconf import DictConfig

from tokenpref.training import PreferenceTrainer, recipe_main


@recipe_main
def main(cfg: DictConfig) -> None:
    """Set up, train, and leave the process group whatever happens."""
    trainer = PreferenceTrainer(cfg, recipe="recipes/tdpo_distributed")
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()


if __name__ == "__main__":
    sys.exit(main())
