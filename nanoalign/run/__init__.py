"""What keeps a run alive: flags, checkpoints, logs, and what the scripts share at both ends."""
