"""Other people's machines: checks and remedies before a command begins. Imports nothing that is slow.

A check returns the lines that a person should read, or raises UserError; a remedy is an environment variable that this
process and its children then find. Each check is one small function; `prepare` lists them all.

prepare    the checks of every command, and those of a training
folders    the home folder, caches, and the folder of temporary files: those of the machine, or our own
cgroups    the control groups of this process
limits     `ulimit`, control groups and /dev/shm
network    the loopback interface, and variables that name an interface
torchrun   variables of torchrun that were left behind, and the address where its ranks meet
variables  variables that libraries read when they are imported, where a wrong value ends them
explain    the limit or the variable behind an error that is nobody's defect
"""
