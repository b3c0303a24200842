"""Check a Ray cluster before anything is started or sent: Ray's own clients wait for minutes at a wrong address.

address   the address that a person typed, or left in a variable, in its parts
probe     find out with plain sockets what answers there
tls       the files with which this shell speaks TLS, as Ray's variables name them
gcs       ask what speaks gRPC: the GCS knows the versions, the nodes and the dashboard of its cluster
check     the address to connect to, or one sentence: what was tried, what answered, what to type instead
advice    the sentences
packages  compare this package and torch on the nodes that will hold ranks
job       the files of a submitted job, and what must not travel with it
start_job.sh  runs there: finds the Python that runs the cluster, and starts this package with it
"""
