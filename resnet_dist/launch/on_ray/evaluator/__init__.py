"""Checkpoints evaluated in a process of their own, while the ranks of their run train on.

process           the process: its place on a node that the ranks leave it, its start, its loss
schedule          which checkpoint is next, where a result goes, what is tried again
before_and_after  what an attempt does with the evaluations before its ranks start, and after they have ended
"""
