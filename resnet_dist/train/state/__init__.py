"""The state of a run at a step: what a checkpoint holds, so that a restart changes nothing.

train_state.py   model, optimizer, position and best value, as tensors and JSON values
ema.py           a moving average of the weights
meter.py         sums of loss and hits since the last log line
"""
