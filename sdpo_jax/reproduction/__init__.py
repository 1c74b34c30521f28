"""The paper's tables and figures: what has to be run for them, running it, and the page."""
