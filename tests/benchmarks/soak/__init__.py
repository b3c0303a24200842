"""One long run on hosts that share nothing, and a random fault every 20 to 60 s: it ends as the run that nothing struck.

    python -m tests.benchmarks.soak --seconds 1800 --steps 4000 --seed 1      # as root, with nginx and PostgreSQL

The undisturbed run comes first. Faults strike for so many seconds, or until the run ends; a submission that ends before the
run is finished is repeated, as a job controller does. The seed decides which fault comes when, and where.

faults      what can strike, and in which order
strike      strike a run until it ends, and bring back nodes that went away
usage       memory, threads and files of the processes that live long, and disk
leftovers   what the run leaves: files, objects, processes, runs that are open
report      the tables
"""
