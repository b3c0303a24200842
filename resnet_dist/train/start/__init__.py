"""Step zero: the weights that a run begins with, the same on every rank.

initial.py     the initial state, and what a new run's weights take from the data and from other weights
init_from.py   read the weights that `model.init_from` names
"""
