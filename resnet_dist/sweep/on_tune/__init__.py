"""The part of a sweep that Ray Tune has: it decides, and this package carries out.

A trial that the scheduler stops saves a checkpoint and closes its run before it ends, and a sweep that is continued gets
what it had seen.

draw        the values of the trials
asha        the scheduler that chooses the trials that are stopped early
actor       the process that trains trials, one after another
experiment  start the trials, and end them with the sweep
settings    the environment variables of Tune
"""
