"""What quantising costs: measured on a text, operator by operator, and what to keep for it."""
