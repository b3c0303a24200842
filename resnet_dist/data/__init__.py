"""Shards in, batches out. Knows nothing of models, training, Ray or MLflow."""
