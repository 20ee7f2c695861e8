# What the scripts beside this one share: start the ranks, and decide what follows. They source it,
# with options of launcher/train.py as its arguments. Nothing in here depends on the site.

say() { echo "slurm     $*"; }

# The last task of an array has the whole array's number for its own: requeued by that, all tasks
# start again.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
requeues=${SLURM_RESTART_COUNT:-0}

# #SBATCH lines take no variables and Slurm tells nobody what they asked for, so the lead is read
# from the line itself; $0 is Slurm's copy of the script.
lead=$(sed -n 's/^#SBATCH --signal=USR1@\([0-9][0-9]*\)$/\1/p' "$0")

# Since 22.05 srun no longer takes this from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

requeue() {
    if [ "$requeues" -ge "$MAX_REQUEUES" ]; then
        say "$*; not requeued again: that was done $requeues times, the most MAX_REQUEUES allows"
        exit "$status"
    fi
    say "$*; requeues"
    scontrol requeue "$job" && exit 0
    say "cannot requeue; go on with the same sbatch command"
    exit "$status"
}

# Ranks get what the lines above set, also where the cluster has jobs begin with --export=NONE.
export SLURM_EXPORT_ENV=ALL

# Does every node of the job still start a process?
all_nodes_answer() {
    local nodes=$SLURM_JOB_NUM_NODES
    timeout 60 srun --overlap --quiet --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 true
}

say "job $job, attempt $((requeues + 1)), on $SLURM_JOB_NODELIST, $(date '+%F %T')"
all_nodes_answer && asks=yes || asks=no # where that does not work, its failure tells nothing
status=0
# Once one rank has left, the others have a minute to leave by themselves. --kill-on-bad-exit would
# end them at once, and a stop that went well could end with the status of a kill.
srun --kill-on-bad-exit=0 --wait=60 \
    python launcher/train.py --resume auto ${lead:+--signal_lead "${lead}s"} "$@" || status=$?
case $status in
    0) say "finished" ;;
    75) requeue "stopped and saved" ;;
    138 | 143) requeue "a signal came before the program listened" ;; # 128 + SIGUSR1, SIGTERM
    2) say "status 2, which trying again would not mend" ;;
    # Slurm itself requeues the job only where it notices the loss before the other ranks fail.
    *) [ $asks = no ] || all_nodes_answer || requeue "status $status, and not every node answers" ;;
esac
exit "$status"
