"""The places of ranks on the nodes of a Ray cluster.

fit       the placement that fits on some nodes, by arithmetic alone
reserved  a part of a node for another process, which leaves the ranks their number
nodes     the nodes of the connected cluster: alive, leaving, free
held      what is free in it, and which jobs hold the rest, in words
placer    choose the placement of every attempt, and wait where the cluster has no room
changes   the change of the cluster for which ranks stop and start again
"""
