"""A machine that trains: its software, and how much of it is in use.

versions  the software and the GPUs of this machine, as tags
host      CPU, memory, disk and network, by psutil
gpus      GPUs, by NVML
usage     the thread that samples both, and the summary of its samples
"""
