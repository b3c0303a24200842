"""The stores that get the metrics of a run beside MLflow, where `--also` asks for it.

choose       the stores by name; refuse those that cannot be opened here
sending      the thread that sends a spool to such a store
fan_out      the publisher that sends a run to MLflow and to such stores
tensorboard  event files in the run folder
"""
