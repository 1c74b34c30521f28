"""Tables, pictures and model cards of a run."""
