"""Checkpoints: the state of a run on disk, whole or absent, verified when it is read.

writer  decide when to save, and write without making the loop wait
folder  write, verify, list and remove checkpoint folders
load    load the model of a checkpoint for prediction
"""
