"""Training: the loop and what it needs. Knows torch, data and model; never Ray or MLflow."""
