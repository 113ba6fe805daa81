"""What a run's config may say: its keys, how they are read and checked, and the command line."""
