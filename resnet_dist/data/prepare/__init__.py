"""A data set → shards with an index: the same source and options give the same bytes, however often interrupted.

sources   a name or a folder → the images and classes of each split
split     which image goes into which shard; a split's folder from its plan to its index
write     the samples of one shard → a tar, in parallel processes
"""
