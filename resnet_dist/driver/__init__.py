"""The driver: the process that turns a request to train into a finished run. Under torchrun it is rank 0.

request    the request of a person, its summary, and the interruption that may end it
preflight  check everything that can be refused before a rank starts; prepare missing shards
fork       begin a run with the checkpoint of another one
output     check that a run can write its files
hold       hold the run, so that nobody else trains it, and end where that right is lost
page       keep what the run's page shows besides metrics and model
publish    open the run in MLflow before its ranks start, and close it whatever ended them
gauges     what Prometheus reads of the run: its step, speed, restarts, age of its checkpoint
launcher   what starts the ranks of a request: this process, torchrun, or Ray, which several runs may share
trial      check a run that is one of several before the first of them is trained
restarts   start lost ranks again, within limits
run        choose the run, start the ranks, publish the run to MLflow, close it on every way out
"""
