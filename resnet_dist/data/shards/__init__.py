"""Local tars → samples: what is in a tar, which tars make a set, and how one sample is read by its id.

members  which members of a tar make up a sample, which is its image, its label, or no part of any
tar      members of a tar from its headers, grouped into samples
offsets  files that keep these offsets: the DALI `.idx` beside a tar, checked before it is used
labels   class ids in the content of label members: numbers, or names of classes
index    index.json: the shards of a set, their sample counts, checksums, class names and rules
reader   one sample by its id, by offset, from any thread
names    names on the command line (patterns, lists, folders, other indexes) → shards
listing  the shards in a folder, and an account of its other files
scan     read one shard: its samples, labels and checksum, and what in it cannot be used
output   the place of a new index, checked before anything is read
build    make an index for shards that another program wrote
verify   compare an index with what its shards hold
"""
