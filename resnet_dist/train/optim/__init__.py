"""The optimizer: which update each parameter gets, and at which learning rate.

build        the recipe's optimizer and its parameter groups
muon         Muon and SGD in one optimizer
schedule     the learning rate of a step
undecorated  torch's optimizers without the import of its compiler
"""
