"""Models and cached references of a run, and what is known before weights are read."""
