"""Data: the shards, the order of samples, and the way from bytes to pixels. Its fields are grouped by topic.

reading       where the sets lie, and how their samples are read and kept
images        the size and values of the images that the network gets, in training and in evaluation
batch         samples of a step: their order, their lanes and micro-batches, and copies of each
augmentation  random changes of training images
combined      Data: all groups together, and what they exclude of one another
"""
