"""Ranks on a Ray cluster: Ray Train places and starts them, and says when one is lost.

launcher    the attempts of a run on a cluster, each a `fit()` of Ray Train
evaluator/  evaluate checkpoints while the ranks train
pool        workers that each call a function on a part of some work
counts      what these workers have done so far, for the bar of their driver
mapped      a function over many items, by Ray Data
connect     connect to a cluster, or start one on this machine
placement/  where ranks fit, how to wait for room, and which change is worth a new start
worker      the process that Ray Train starts for a rank
watch       what the driver sees of an attempt while it waits
failures    what Ray Train raises → whose fault it was
gauges      the gauges of a run among Ray's own metrics
settings    the environment variables of Ray that we set or read
"""
