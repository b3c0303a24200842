"""The state of a run at a step: what a checkpoint holds, so that a restart changes nothing.

train_state    model, optimizer, position and best value, as tensors and JSON values
ema            a moving average of the weights
meter          sums of loss and hits since the last log line
usage_metrics  the metrics of the machines of a run
step_times     the time of a step: waiting for data, computing, waiting for other ranks
"""
