"""One optimizer step: the same update of the weights on any number of ranks and micro-batches.

train_step      the step: micro-batches forward and backward, then one update
loss            the loss of every image, mixed or not
gradient_sums   sum gradients over micro-batches and ranks, by DDP
exact_sums      sum them in float64 instead, so that the order does not matter
batch_norm      running statistics that do not depend on the number of ranks
block_drops     the blocks that stochastic depth drops
profile         a trace of some steps
gradient_norms  the norm of every layer's gradient, for the log
"""
