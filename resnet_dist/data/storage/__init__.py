"""A shard may lie anywhere; here its URL becomes a plain tar on this machine.

urls          what a URL is: local or remote, compressed or not
transfer      how the bytes of a remote file come over: in chunks, with retries
unpack        compressed tar → plain tar
cache_files   the files that one shard has in the cache folder
quota         the byte limit of the cache folder, shared by a node's processes
shard_cache   all of it together: a shard's URL → a verified local file
"""
