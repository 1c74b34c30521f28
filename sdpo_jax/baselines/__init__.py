"""The paper's traditional recommenders on this project's windows, candidates and metrics.

Shape letters are declared in `sdpo_jax.system.sharding`; here B counts windows, and T the positions
of a history, left-padded.
"""
