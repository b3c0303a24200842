"""The stores that get the metrics of a run beside MLflow, where `--also` asks for it.

choose       the stores by name; refuse those that cannot be opened here
sending      the thread that sends a spool to such a store
beside       the publisher of a run with such stores beside it
tensorboard  event files in the run folder
"""
