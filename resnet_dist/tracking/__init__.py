"""MLflow: the run, its metrics and its model. The driver's business alone; ranks only append to a spool."""
