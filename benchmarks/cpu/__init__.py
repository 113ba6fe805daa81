"""Our steps and TRL's on the same pairs, by turns, on the CPU; and the head alone beside others.

``python -m benchmarks.cpu`` from the repository's root; :mod:`benchmarks.cpu.work` says what the work is.
"""
