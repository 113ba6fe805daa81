"""Compares our training steps with TRL's on the same pairs on the CPU, and the head alone with other implementations.

Run ``python -m benchmarks.cpu`` in the repository's root. :mod:`benchmarks.cpu.work` defines the work.
"""
