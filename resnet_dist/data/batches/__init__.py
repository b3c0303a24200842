"""Batches: the samples of a step, read, decoded and augmented by threads ahead of the loop.

loader          the batches of one rank by step, prepared ahead of the loop
decode_threads  the threads that prepare them
fill            one thread's task: samples of the index become rows of a batch
gpu_fill        the same on a GPU, which decodes and resizes
device_copies   copies of batches to the device, one ahead
resident        decoded images that stay in memory or on the device, and the memory that batches reuse
bad_samples     the limit on bad samples, for commands that measure something over a set
"""
