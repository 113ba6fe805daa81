"""TI-DPO: token weights from gradient attribution, and a triplet with a third answer sampled from the policy.

    tune run recipes/ti_dpo_distributed --config smollm2/135M_ti_dpo
    tune run recipes/ti_dpo_distributed --config smollm2/135M_ti_paper anchors.refresh=once
    tune run --nproc_per_node 8 recipes/ti_dpo_distributed --config llama3_2/1B_ti_dpo batch_size=4 loss.gamma=0 ~anchors

Every part is a component: other weights (``token_weights=tokenpref.data.StoredScores token_weights.path=...``), other anchors
(``anchors=tokenpref.data.ColumnAnchors``), another loss (``loss=tokenpref.losses.TISDPOLoss``), or classes in a file of your own.
"""

import sys

from omegaconf import DictConfig

from tokenpref.training import PreferenceTrainer, anchors, recipe_main, token_weights


@recipe_main
def main(cfg: DictConfig) -> None:
    """Set up, train, and leave the process group whatever happens."""
    trainer = PreferenceTrainer(cfg, recipe="recipes/ti_dpo_distributed", sources=(token_weights, anchors))
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()


if __name__ == "__main__":
    sys.exit(main())
