"""What happens at step s, as pure functions of the step and the seed: nothing depends on the ranks or on a restart.

philox    random numbers from (seed, epoch, purpose, id) instead of from a state
samples   the sample ids of every step, for each lane
sizes     the image size of every step
"""
