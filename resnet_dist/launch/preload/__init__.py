"""Rank processes that need not import: a process per node imports once, and each rank of that node is its copy.

The imports of a rank take longer than everything else of its start. The process outlives the ranks, so that those of the
next attempt begin at once, and they share its memory.

server  the process that imports, copies itself for each rank, and ends when it is no longer needed
copies  how such a copy answers and ends
client  ask for a rank, start the server where there is none, and wait for the end of the rank
wire    the messages between them
"""
