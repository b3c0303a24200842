"""Local tars → samples: what is in a tar, which tars make a set, and how one sample is read by its id.

tar      members of a tar, grouped into samples by webdataset's rules; the DALI `.idx` beside a tar
index    index.json: the shards of a set, their sample counts, checksums and class names
reader   one sample by its id, by offset, from any thread
names    what a person types (patterns, lists, folders, other indexes) → shards
build    make an index for shards that another program wrote
verify   compare an index with what its shards hold
"""
