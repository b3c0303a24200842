"""The order of training as pure functions of the step and the seed, independent of the ranks and of restarts.

philox    random numbers from (seed, epoch, purpose, id) instead of from a state
versions  the versions of the order, of which a run keeps one
lanes     the shuffle inside a lane, in its versions
samples   the sample ids of every step, for each lane
shares    the lanes and rows of a rank in every step
sizes     the image size of every step
"""
