"""The paper's traditional recommenders on this project's windows, candidates and metrics.

Shape letters: B windows, T places of a history (left-padded), I items, D width, C candidates.
"""
