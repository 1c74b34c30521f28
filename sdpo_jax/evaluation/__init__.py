"""Decoding, metrics, files and tables of an evaluation."""
