"""The paper's tables and figures: their runs, and the page of results."""
