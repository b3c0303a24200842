"""A data set → shards with an index: the same source and options give the same bytes, however often interrupted.

items         a sample that is not read yet, a source of them; the division where a source has no splits
judge         one file → an image, or a finding with the reason
layout        the names of folders → which are the splits
scan          the walk through a folder
image_folder  a folder → classes, items and findings of each split
shard_splits  the index of each split of a source, and the folders that have none
indexed       shards with an index → classes, items and findings of each split
sources       the name of a data set, or a folder → a source
output        the output folder: checked before anything is read, cleaned where a split is refused
split         which image goes into which shard; a split's folder from its plan to its index
seekable      a JPEG → the same one, of which a part is found without decoding what lies before it
write         the samples of one shard → a tar, in parallel processes
"""
