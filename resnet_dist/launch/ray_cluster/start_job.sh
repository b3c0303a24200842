# Start this package on a Ray cluster: sh start_job.sh VERSION ARGUMENTS…
# The job gets the PATH of the shell that started Ray, where the Python of the cluster, the only one that is sure to
# have Ray, may be missing. The raylet, a parent of this process, has it in its command line.
wanted=$1
shift
process=$$
while [ "${process:-0}" -gt 1 ] && [ -r "/proc/$process/cmdline" ]; do
    python=$(tr '\0' '\n' < "/proc/$process/cmdline" | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p')
    [ -n "$python" ] && break
    process=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status")
done
[ -n "$python" ] || python=$(command -v python3 || command -v python) || {
    echo "error: the node $(uname -n) has no python on its PATH, so it cannot have resnet_dist; start Ray from the environment that has it"
    exit 2
}
found=$("$python" -c 'import resnet_dist; print(resnet_dist.__version__)' 2>&1) || {
    reason=$(printf '%s\n' "$found" | tail -n 1)
    echo "error: the nodes of this cluster do not have resnet_dist ($reason, with $python on $(uname -n)); install version $wanted there, for every node, or start Ray from an environment or image that has it"
    exit 2
}
found=$(printf '%s\n' "$found" | tail -n 1)
[ "$found" = "$wanted" ] || echo "note: this cluster has resnet_dist $found, the machine that submits has $wanted"
exec "$python" -m resnet_dist "$@"
