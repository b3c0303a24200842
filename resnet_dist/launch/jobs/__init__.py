"""Ray Jobs: submit a recipe to a running cluster, and list, follow, look at and stop what was submitted.

client       Ray's client of a cluster, and why it did not answer
listing      the jobs of a cluster
job          one submitted job: what its metadata names, its state, and how it is found by the name of its run
submission   what a person submits: the command that the cluster runs, the metadata and environment of the job
environment  the variables of `--env`, and which of them look like secrets
files        the files that travel with a job: the recipe, and the folder of `--working-dir`
submit       send a job, and follow it
follow       print the log of a job until it has ended
progress     what the log of a job says: the step, the checkpoint, the error
ending       the exit code of a job that has ended, and the sentence where its log does not have one
advice       the lines that a person can type next
stop         end a job with a checkpoint
"""
