"""One optimizer step: the same update of the weights on any number of ranks and micro-batches.

train_step.py      the step: micro-batches forward and backward, then one update
loss.py            the loss of every image, mixed or not
gradient_sums.py   sum gradients over micro-batches and ranks, by DDP
exact_sums.py      sum them in float64 instead, so that the order does not matter
batch_norm.py      running statistics that do not depend on the number of ranks
block_drops.py     the blocks that stochastic depth drops
gradient_norms.py  the norm of every layer's gradient, for the log
"""
