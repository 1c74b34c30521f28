"""One run on disk: its config, inputs, checkpoints and curves."""
