"""Metrics on their way from rank 0 through a file to a person and to MLflow: no server can slow a rank.

protocol      the publishers of a run and of a study, as the driver sees them
spool         the file that rank 0 appends its metrics to, and that the driver follows
backlog       what a store lacks of a spool
store         where MLflow keeps the runs of an output folder
origin        tags that say where a run comes from
logged_run    a run as a tracker has it, and what several have in common
console       the thread that shows a spool to a person; the publisher of a run without MLflow
registration  the name and the alias under which a model is registered
mlflow/       the publishers of MLflow, and everything else that knows its API
also/         what gets the metrics beside MLflow, such as TensorBoard
open          refuse what cannot be used; choose and open a publisher
sync          send what a tracker did not get of the runs of an output folder
locate        find the folder of a run by its name, its path or its id
abandoned     close what drivers that died left RUNNING
"""
