"""`resnet-dist bench`: speeds as ratios to a baseline that runs in turn, in the same run.

loader.py     images per second of the loader, against decoding alone
step.py       the whole training loop, against the loop in bare.py
bare.py       the baseline of step.py: a PyTorch loop as one writes it by hand
follow.py     the work beside the ranks of a real run, for step.py: uploads and a progress bar
startup.py    `bench launch`: from the command to the first step, against the program in minimal.py
minimal.py    the baseline of startup.py: the smallest program that trains one step with Ray Train
ranks.py      runs a function on several ranks of this machine
synthetic.py  shards of noise images
machine.py    the machine and the version of torch that a figure belongs to
"""
