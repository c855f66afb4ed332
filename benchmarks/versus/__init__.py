"""The sides of `train_vs_trl.py`, each for a process of its own: `prepare` writes what all of them read."""
