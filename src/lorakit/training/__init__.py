"""The training loop and what it needs. `config` imports no torch."""
