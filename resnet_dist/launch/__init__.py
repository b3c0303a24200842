"""Ways to start the ranks of a run. All of them end in `rank.run_attempt`, so they train the same way.

attempt               the orders that every rank receives, and the type of a launcher
rank                  train as one rank: a training thread, and a main thread that watches it
fence                 end a rank whose attempt is not the newest, or whose driver is gone, before it writes
checkpoint_evaluator  evaluate checkpoints one by one, in a process beside the ranks or in the driver
run_storage           the run's storage as a rank sees it: its lease, stop requests, reports of stalls
outstanding           the evaluations beside training that are outstanding, and the end of their record
start_times           the seconds from the cause of a start to its first step, by phase
local                 one rank in this process
on_ray                ranks on a Ray cluster, placed and started by Ray Train
preload               ranks as copies of a process that has imported what they need
torchrun              ranks that torchrun has started
jobs                  submit a recipe to a cluster as a Ray job, which runs `train` there; list, follow, stop
ray_cluster           check the address and the nodes of a cluster before anything is started or sent
"""
