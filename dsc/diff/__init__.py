"""Two programs side by side: what changed, what it costs, how far apart their results are."""
