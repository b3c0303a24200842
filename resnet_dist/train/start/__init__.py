"""Step zero: the weights that a run begins with, the same on every rank.

initial    the initial state, and what a new run's weights take from the data and from other weights
init_from  read the weights that `model.init_from` names
threads    the CPU threads that a rank computes with
"""
