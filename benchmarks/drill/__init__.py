"""The stages of ``python -m benchmarks.gpu_drill``, one file for each subject."""
