"""Step zero: what a run begins with, the same on every rank.

indexes    the indexes of the data sets, read once a node
initial    the initial state, and what a new run's weights take from the data and from other weights
init_from  read the weights that `model.init_from` names
shapes     networks without weights
threads    the CPU threads that a rank computes with
"""
