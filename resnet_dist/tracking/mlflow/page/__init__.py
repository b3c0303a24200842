"""The page of a run in MLflow, besides parameters, metrics and the model.

inputs       the data sets as inputs of the run, and the files of runs/page
lineage      tags and link of a forked run
figures      the figures of a run that has ended
evaluations  evaluations of its model that were made later
"""
