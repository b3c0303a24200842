"""MLflow: the run, its metrics and its model. Only the driver and the commands use it, never a rank.

run        the MLflow run: created, resumed, described and closed
upload     the thread that sends the metrics of a spool to it
model      log a trained model with the run; download it
serve      the code that MLflow runs to serve that model
publisher  the publisher of a run, made of the modules above
study      the publisher of a study: the parent of its runs
ui         serve the embedded store to a browser
"""
