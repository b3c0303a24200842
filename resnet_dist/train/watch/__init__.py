"""The watch over a run: end it on all ranks together, and name what went wrong.

control.py    stop or save at the same step on all ranks
guards.py     stop a run that cannot succeed, with the value and the field to change
progress.py   the phase that a rank is in
watchdog.py   name the rank that hangs
"""
