"""How a Program is rewritten: passes, patterns, rules, and the driver that applies them."""
