"""TIS-DPO: preference training in which every token has a weight of its own.

The weights come from a store that ``recipes/estimate_weights_distributed`` wrote, from columns of the data, or from a pair
of prompts on the reference model, scored as training goes:

    tune run recipes/tis_dpo_distributed --config smollm2/135M_tis_dpo
    tune run recipes/tis_dpo_distributed --config smollm2/135M_tis_dpo weight_transform=tokenpref.weights.transforms.rank_based
    tune run --nproc_per_node 8 recipes/tis_dpo_distributed --config llama3_2/1B_tis_dpo batch_size=4 loss.beta=0.2

A source of weights of your own needs no copy of this file: ``token_weights._component_=my_weights.MyScores``.
"""

import sys

from omegaconf import DictConfig

from tokenpref.training import PreferenceTrainer, recipe_main, token_weights


@recipe_main
def main(cfg: DictConfig) -> None:
    """Set up, train, and leave the process group whatever happens."""
    trainer = PreferenceTrainer(cfg, recipe="recipes/tis_dpo_distributed", sources=(token_weights,))
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()


if __name__ == "__main__":
    sys.exit(main())
