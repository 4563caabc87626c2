"""What a run needs around the lesson: flags, checkpoints, logs, ranks, memory."""
