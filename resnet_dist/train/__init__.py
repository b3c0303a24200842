"""Training: the loop and what it calls, the same on one rank and on many. It imports neither Ray nor MLflow.

Modules and folders, in reading order:

loop         the loop, on one screen: read it first
parts        the parts that the loop works with: made, restored and closed
plan         the lengths of a run in steps: when to log, evaluate and save
device       check that the device can do what the recipe asks, and configure it
start/       step zero: the weights that a run begins with
step/        one optimizer step: micro-batches, loss, gradients and batch norm over all ranks
optim/       optimizers, their parameter groups, and the learning rate
state/       the state of a run at a step: weights, optimizer, average, sums since the last log line
evaluate     metrics of the evaluation set, with every sample counted once
log_lines    the metrics and bad samples of a log line, over all ranks
predictions  the prediction for every sample of an evaluation, for figures
checkpoint/  save the state, verify it, load the newest good one
watch/       stop all ranks at the same step, stop a run that cannot succeed, name the rank that hangs
tracker      the interface through which rank 0 reports metrics
"""
