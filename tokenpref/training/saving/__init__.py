"""The run's folder, its checkpoints, and when they are written."""
