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
# the last #SBATCH line of the script that has one; $0 is Slurm's copy of it. Without @ it is 60.
signal=$(sed -nE "s/^#SBATCH[[:space:]](.*[[:space:]])?--signal[=[:space:]][[:space:]]*[\"']?([^\"'#[:space:]]+).*/\2/p" \
    "$0" | tail -n 1)
known='^([Rr]:)?([Ss][Ii][Gg])?([Uu][Ss][Rr]1|[Tt][Ee][Rr][Mm]|10|15)(@([0-9]+))?$'
lead=
if [[ $signal =~ $known ]]; then
    lead=${BASH_REMATCH[5]:-60}
elif [ -n "$signal" ]; then
    say "warning: --signal=$signal does not tell the ranks to save; write --signal=USR1@SECONDS"
fi

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

# Starts a command on every node of the job, and succeeds if it does everywhere.
on_every_node() {
    local nodes=$SLURM_JOB_NUM_NODES
    timeout 60 srun --overlap --quiet --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 "$@"
}

# Why a job ends that is not requeued, by the status of its program.
say_why() {
    local again="the same sbatch command goes on from the last checkpoint"
    case $status in
        2) if on_every_node true && ! on_every_node sh -c 'command -v python > /dev/null'; then
            say "no python in PATH on some node: fit PATH or module load, in the SITE lines"
        else
            say "status 2: trying again would not mend what the error above names"
        fi ;;
        73) say "status 73: another job writes the run folder. Once it has ended, $again" ;;
        137) say "status 137: a rank was killed (signal 9), by a person or because memory ran out" \
            "(Slurm then says oom_kill above: raise --mem). Not requeued; $again" ;;
        *) say "status $status: not requeued" ;;
    esac
}

say "job $job, attempt $((requeues + 1)), on $SLURM_JOB_NODELIST, $(date '+%F %T')"
on_every_node true && asks=yes || asks=no # if it fails now, it is not asked again
status=0
# After the first rank exits, the others have a minute to exit. --kill-on-bad-exit=1 would kill them
# at once, and a run that saved well could end with the status of a kill.
srun --kill-on-bad-exit=0 --wait=60 \
    python "$root/launcher/train.py" --resume auto ${lead:+--signal_lead "${lead}s"} "$@" || status=$?
case $status in
    0) say "finished" ;;
    # Also if a disk was full or away, so it is not known here whether a checkpoint was saved.
    75) requeue "stopped for now, as the lines above say" ;;
    138 | 143) requeue "a signal came before the program listened" ;; # 128 + SIGUSR1, SIGTERM
    2 | 73) say_why ;;
    # Slurm requeues the job itself only if it notices a lost node before other ranks fail.
    *)
        [ $asks = no ] || on_every_node true || requeue "status $status, and not every node answers"
        say_why
        ;;
esac
exit "$status"
