"""Checkpoints: the state of a run on disk, whole or absent, verified when it is read.

writer          decide when to save, and write without making the loop wait
snapshot        a state copied to host memory
store           the stored checkpoints of a run: which one is newest, which ones are kept
folder          write, verify, list and remove checkpoint folders
load            load the model of a checkpoint for prediction
single_file     a model as one safetensors file
follow_results  the results of a process that evaluates these checkpoints
awaiting        the checkpoints that await an evaluation, and the record of its results
"""
