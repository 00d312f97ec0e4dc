"""How a compiled program runs: plans, sessions, executors, artifacts."""
