"""A shard may lie anywhere; here its URL becomes a plain tar on this machine.

urls          what a URL is: local or remote, compressed or not
stored_file   a file as an index records it: readable where it lies, allowed, unchanged
retry         the patience with one file: what is retried, how long, and how it ends when the command does
http          files on web servers, whatever these make of ranges, lengths and encodings
transfer      how the bytes of a remote file come over: in chunks, with retries
s3            the bytes of objects in S3
node_copy     one copy of a small remote file for all processes of a node
command       shards that are the output of a shell command
unpack        compressed tar → plain tar
cache/        the folder of a node for shards: its limits, and how a shard comes into it
shard_cache   all of it together: a shard's URL → a verified local file
"""
