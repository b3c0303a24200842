"""MLflow: the run, its metrics and its model. Only the driver and the commands use it, never a rank.

run        the MLflow run: created, resumed, described and closed
upload     the thread that sends the metrics of a spool to it
model      log a trained model with the run; download it
serve      the code that MLflow runs to serve that model
publisher  the publisher of a run, made of the modules above
study      the publisher of a study: the parent of its runs
ui         serve the embedded store to a browser
"""

import os

# MLflow reads the first one when it is imported, and no module of this folder runs before this one.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# With MLflow's defaults, requests to a server that is down fail only after minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
