"""Shards in, batches out: the data plane. It knows nothing of models, training, Ray or MLflow.

storage   URLs → local files: fetch, verify, unpack, cache
shards    local tars → samples: the index and the reader that finds a sample by its id
images    encoded bytes → augmented pixels
batches   sample ids → the batch of a step, decoded ahead of the training loop
prepare   a data set → shards with an index
findings  the account of a scan: what became of every file or member
"""
