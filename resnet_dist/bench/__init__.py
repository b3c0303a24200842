"""`resnet-dist bench`: speeds as ratios to a baseline that runs in turn, in the same run.

loader         images per second of the loader, against decoding alone
step           the whole training loop, against the loop in bare
bare           the baseline of step: a PyTorch loop as one writes it by hand
follow         the work beside the ranks of a real run, for step: uploads and a progress bar
startup        `bench launch`: from the command to the first step, against the program in minimal
minimal        the baseline of startup: the smallest program that trains one step with Ray Train
scale          the load of a run on many nodes, computed; and what breaks first
shard_traffic  the shards that the nodes fetch and keep, simulated
ranks          run a function on several ranks of this machine
synthetic      shards of noise images
machine        the machine and the version of torch that a figure belongs to
"""
