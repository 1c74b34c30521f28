"""Sequence log-probabilities of candidates and the losses over them."""
