"""The watch over a run: end it on all ranks together, and name what went wrong.

control     stop or save at the same step on all ranks
guards      stop a run that cannot succeed, with the value and the field to change
progress    the phase that a rank is in
positions   what all ranks are at, through the store of the process group
stall       the words for ranks that stand still
watchdog    name the rank that hangs
stragglers  name the rank that is slow
"""
