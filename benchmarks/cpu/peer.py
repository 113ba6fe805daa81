"""The peer's process: TRL's DPOTrainer on a folder of work. Runs in TRL's environment and needs nothing of ours.

python -m benchmarks.cpu.peer FOLDER RESULT.json '{"mode": "ref", "threads": 2}'
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cpu.process import StepClock, peak_mib, reset_peak, rss_mib, save, settled_mib, versions
from benchmarks.cpu.work import ADAPTER, Task, go_offline

__all__ = ["measure"]


def measure(
    folder: Path, mode: str, threads: int = 2, fused_adamw: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Train and return what was measured.

    Args:
        folder: of :func:`benchmarks.cpu.work.write`.
        mode: "ref", "precompute", or "lora", which trains the adapters of ``folder/adapter`` with peft.
        threads: of torch.
        fused_adamw: update all parameters in one call.
        device: "cpu" or "cuda", whose memory is then reported.

    Returns:
        Times, losses and memory in MiB: ``loaded`` (models read, nothing computed), ``before`` training, ``peak`` in it, and
        ``precompute_peak`` and ``precompute_s`` where there is something to compute beforehand.
    """
    go_offline(device)
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, TrainerCallback

    trl: Any = importlib.import_module("trl")
    torch.set_num_threads(threads)
    task = Task.read(folder)
    peft: Any = importlib.import_module("peft") if mode == "lora" else None
    adapter: Any = None
    if peft:
        adapter = peft.LoraConfig.from_pretrained(folder / ADAPTER)
        adapter.inference_mode = False  # files of saved adapters say true
    memory: dict[str, float] = {}
    clock = StepClock(device)
    losses: list[float] = []
    precompute: list[float] = []

    class Watch(TrainerCallback):
        """Notes times and losses."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    def touch(*models: Any) -> None:
        """Read all weights, which may still lie in the file: they belong to the loaded model."""
        for model in models:
            if model is not None:
                sum(float(p.detach().sum()) for p in model.parameters())

    class Peer(trl.DPOTrainer):
        """Notes the memory before the reference's log-probabilities are computed, and their time."""

        def _precompute_ref_logps(self, *args: Any, **more: Any) -> Any:
            touch(self.model)
            memory["loaded"] = settled_mib(device)
            reset_peak(device)
            start = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **more)
            precompute.append(time.perf_counter() - start)
            memory["precompute_peak"] = peak_mib(device)
            return result

    texts = [{k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in task.pairs(folder)]
    with tempfile.TemporaryDirectory() as output:
        trainer = Peer(
            model=str(folder / "model"),
            args=trl.DPOConfig(
                output_dir=output,
                per_device_train_batch_size=task.batch,
                max_steps=task.steps,
                max_length=task.length,
                beta=task.beta,
                loss_type=["sigmoid"],
                optim="adamw_torch_fused" if fused_adamw else "adamw_torch",
                learning_rate=task.lr,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=0.0,  # no clipping
                gradient_checkpointing=False,
                precompute_ref_log_probs=mode == "precompute",
                train_sampling_strategy="sequential",
                bf16=False,
                use_cpu=device == "cpu",
                model_init_kwargs={"dtype": task.dtype},
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=task.seed,
            ),
            train_dataset=Dataset.from_list(texts),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Watch()],
            peft_config=adapter,
        )
        if peft:
            # The usual way of TRL: it makes the adapters, and its reference is the model without them. Both sides start equally.
            peft.set_peft_model_state_dict(
                trainer.model, load_file(folder / ADAPTER / "adapter_model.safetensors")
            )
        touch(trainer.model, trainer.ref_model)
        if "loaded" not in memory:
            memory["loaded"] = settled_mib(device)
        memory["before"] = settled_mib(device) if device == "cuda" else rss_mib()
        reset_peak(device)
        trainer.train()
        memory["peak"] = peak_mib(device)
    tokens, answers = task.tokens(folder)
    return {
        **clock.summary(tokens, task.warmup),
        "losses": losses,
        "memory_mib": memory,
        "precompute_s": sum(precompute) if precompute else None,
        "tokens": tokens,
        "answer_tokens": answers,
        "versions": versions(
            "torch", "trl", "transformers", "peft", "accelerate", "datasets", "liger-kernel"
        ),
    }


if __name__ == "__main__":
    save(Path(sys.argv[2]), measure(Path(sys.argv[1]), **json.loads(sys.argv[3])))
