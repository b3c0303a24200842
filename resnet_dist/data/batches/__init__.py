"""Batches: the samples of a step, read, decoded and augmented by threads ahead of the loop.

loader.py       the batches of one rank by step, prepared ahead of the loop
decode_threads.py  the threads that prepare them
fill.py         one thread's task: samples of the index become rows of a batch
gpu_fill.py     the same on a GPU, which decodes and resizes
device_copies.py  copies of batches to the device, one ahead
resident.py     decoded images that stay in memory or on the device, and the memory that batches reuse
bad_samples.py  the limit on bad samples, for commands that measure something over a set
"""
