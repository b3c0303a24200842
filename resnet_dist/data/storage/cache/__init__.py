"""The folder of a node in which remote and compressed shards are kept, shared by its processes through files alone.

folder     its limits, and the files that one shard has in it
quota      its byte limit
disk_room  room on a disk that is full before the limit is reached
fetch      how one shard comes into it: fetched, verified, unpacked, then renamed
"""
