"""The optimizer: which update each parameter gets, and at which learning rate.

build.py      the recipe's optimizer and its parameter groups
muon.py       Muon and SGD in one optimizer
schedule.py   the learning rate of a step
"""
