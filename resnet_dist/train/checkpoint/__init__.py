"""Checkpoints: the state of a run on disk, whole or absent, verified when it is read.

writer.py   decide when to save, and write without making the loop wait
folder.py   write, verify, list and remove checkpoint folders
load.py     load the model of a checkpoint for prediction
"""
