"""MLflow: the run, its metrics and its model. Only the driver and the commands use it, never a rank.

database/  the SQLite file or database that holds runs: checked, created, kept with its folder
run        the MLflow run: created, resumed, described and closed
values     values and names as MLflow takes them
failure    explain the failure of a tracker; tell a mistake from an outage
upload     the thread that opens the run and sends it the metrics of a spool
logged/    a logged model: its weights, code, signature and card; where it is; whether it loads
model      log a trained model with the run; download it
registry   register a logged model under a name and an alias
results    publish the recipe, and the results of a run that has ended
page/      the data sets, figures and other files of a run's page
publisher  the publisher of a run, made of the modules above
group      the publisher of a study or sweep: the parent of its runs
sync       send what a tracker did not get; close what a dead driver left open
reading    read runs back: those of an experiment, one by its name, the history of a metric
browse/    MLflow's page: served, linked, and opened with columns and charts
"""

import logging
import os
import warnings

# MLflow reads the first ones when it is imported, and no module of this folder runs before this one.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# With MLflow's defaults, requests to a server that is down fail only after minutes. The uploader retries by itself.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# MLflow's own lines would stand between ours, with passwords in them: what matters is in the errors that it raises.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy|urllib3|requests|pydantic)\b")
# A model holds what it needs, and nothing of the folder that a command was typed in.
os.environ["MLFLOW_UV_AUTO_DETECT"] = os.environ["MLFLOW_LOG_UV_FILES"] = "false"
# Variables of another job in a shell: they would move the run, split it, or link its metrics to another model.
for _name in ("RUN_ID", "RUN_NAME", "EXPERIMENT_ID", "EXPERIMENT_NAME", "ACTIVE_MODEL_ID", "REGISTRY_URI"):
    os.environ.pop(f"MLFLOW_{_name}", None)
