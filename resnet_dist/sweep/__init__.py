"""Sweeps: trials of one recipe with other values of some fields, several at the same time, and the best of them.

search    `FIELD=VALUES` on the command line: a range or a list of values of one field
plan      the trials that are drawn once, with their outcomes, in sweep.json
request   the request of a person to run a sweep, and the request to train each of its trials
trial     train one trial in a thread of this process, and report its evaluations
watch     the trials that run: their reports and ends, and the stops that are requested of them
room      how many trials run at the same time, and what each of them gets of the machines
on_tune/  Ray Tune draws the trials, starts them, and stops those that are not among the best
run       run the trials that have no outcome yet; continue a sweep that was interrupted
report    the table, the best trial, and the sentence about all of them
figure    draw the figure
"""
