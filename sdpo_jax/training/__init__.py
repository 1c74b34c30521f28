"""State and step, optimizer, reference log-probs, checkpoints, metrics."""
