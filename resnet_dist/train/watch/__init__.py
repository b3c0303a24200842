"""The watch over a run: end it on all ranks together, and name what went wrong.

control   stop or save at the same step on all ranks
guards    stop a run that cannot succeed, with the value and the field to change
progress  the phase that a rank is in
watchdog  name the rank that hangs
"""
