"""The driver: one process that turns a request to train into a finished run. Rank 0 of torchrun is the driver too.

request    the request of a person, its summary, and the interruption that may end it
preflight  check everything that can be refused before a rank starts; prepare missing shards
run        choose the run, start the ranks, publish the run to MLflow, close it on every way out
"""
