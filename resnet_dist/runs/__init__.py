"""Runs in their storage: the folder of a run, and the choice of the run to start or resume. Knows no torch.

storage/            a folder or a bucket, behind one interface
page                the files of a run that its page in MLflow shows
folder              the objects of a run folder, its lock, and what run.json records
lineage             the run and the step that a forked run began with
evaluation_results  the results of evaluations that another process makes of a run's checkpoints
stalls              reports of ranks that stand still, from a rank to the driver
choose              find or name a run; refuse to resume it with a recipe that would change its curve
group_folder        the folder of a study or sweep, runs that belong together: what it records, and its lock
"""
