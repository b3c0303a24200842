"""The operating system around this process, in the terms that the package needs. Knows no torch.

command      who started this process, and the command line that resumes a run
signals      interruptions: handle, defer, or turn into a request to stop
streams      our lines to the person, those of libraries to a log
log_writer   the process that writes that log
threads      pools of threads that an interruption does not wait for
redact       texts and URLs without passwords and signatures
locks        a lock between processes, on file systems without flock too
limit        a call that may never end, with a limit to the wait for it
files        write a file atomically; compute a checksum
cpus         the CPUs that this process may use
memory       the memory that this process can still get, and when garbage is collected
provenance   the user and the git commit behind a run
node         a machine that trains: its software, and how much of it is in use
environment  what people's machines lack: checks and remedies before a command begins
"""
