r"""Build a contrastive pair of models: pi+ that prefers good answers, pi- that prefers bad ones.

``method: dpo`` trains with DPO on the data and on the data with chosen and rejected exchanged, ``sft`` on the chosen and on
the rejected answers, ``prompt`` trains nothing and writes down two prompts for one model:

    tune run recipes/contrastive_reference_distributed --config smollm2/135M_contrastive_reference
    tune run recipes/contrastive_reference_distributed --config smollm2/135M_contrastive_reference \
        method=prompt output_dir=outputs/prompt_pair

Writes ``pair.yaml`` and the trained sides to ``output_dir``, for ``recipes/estimate_weights_distributed``. Run again with
the same config it keeps what is finished and goes on where it stopped.
"""

import sys

from omegaconf import DictConfig

from tokenpref.training import ContrastiveReference, recipe_main


@recipe_main
def main(cfg: DictConfig) -> None:
    """Run, and leave the process group whatever happens."""
    builder = ContrastiveReference(cfg)
    try:
        builder.run()
    finally:
        builder.close()


if __name__ == "__main__":
    sys.exit(main())
