"""The databases that MLflow opens without a server.

check     refuse one that cannot hold runs, before a run begins
connect   open one; create its tables once
relocate  find the artifacts of the embedded store where they are now
"""
