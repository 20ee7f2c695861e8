# Shared code of train.sbatch and train_array.sbatch: starts the ranks, and requeues the job or ends
# it by their exit status. Its arguments are options of launcher/train.py, and the script has set
# root to the repository's folder. Nothing in here depends on the cluster.

say() { echo "slurm     $*"; }

# The SLURM_JOB_ID of an array's last task is the id of the whole array: requeueing that would start
# all tasks again. ARRAYJOB_TASK names this task alone.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
requeues=${SLURM_RESTART_COUNT:-0}

# Slurm does not tell a job which --signal it was submitted with, so the lead in seconds is read from
# the #SBATCH line of the script; $0 is Slurm's copy of it.
lead=$(sed -n 's/^#SBATCH --signal=USR1@\([0-9][0-9]*\)$/\1/p' "$0")

# Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
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

# Pass this environment to the ranks, even if the cluster submits jobs with --export=NONE.
export SLURM_EXPORT_ENV=ALL

# Succeeds if every node of the job still starts a process.
all_nodes_answer() {
    local nodes=$SLURM_JOB_NUM_NODES
    timeout 60 srun --overlap --quiet --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 true
}

say "job $job, attempt $((requeues + 1)), on $SLURM_JOB_NODELIST, $(date '+%F %T')"
all_nodes_answer && asks=yes || asks=no # if it fails now, it is not asked again
status=0
# After the first rank exits, the others have a minute to exit. --kill-on-bad-exit=1 would kill them
# at once, and a run that saved well could end with the status of a kill.
srun --kill-on-bad-exit=0 --wait=60 \
    python "$root/launcher/train.py" --resume auto ${lead:+--signal_lead "${lead}s"} "$@" || status=$?
case $status in
    0) say "finished" ;;
    75) requeue "stopped and saved" ;;
    138 | 143) requeue "a signal came before the program listened" ;; # 128 + SIGUSR1, SIGTERM
    2) say "status 2, which trying again would not mend" ;;
    # Slurm requeues the job itself only if it notices a lost node before other ranks fail.
    *) [ $asks = no ] || all_nodes_answer || requeue "status $status, and not every node answers" ;;
esac
exit "$status"
