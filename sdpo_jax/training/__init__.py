"""The step, the loop of a stage, the optimizer, the order of examples, reference log-probs."""
