"""Models that dsc can export, their configurations, and the tiny trained checkpoint."""
