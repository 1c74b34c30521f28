"""Decoders in Flax NNX, LoRA, and the tables that bring weights in."""
