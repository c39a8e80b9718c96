#!/usr/bin/env bash
# One process per GPU on a Slurm cluster; JAX finds the others through Slurm's variables.
#SBATCH --job-name=kdsearch
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

usage() {
  cat <<'END'
usage: sbatch [sbatch's options] launch/slurm.sh MODULE ARGUMENTS...
       sbatch --nodes=2 launch/slurm.sh kdsearch_jax.search --resume --workdir /shared/runs/two

Runs python -m MODULE ARGUMENTS with one process a GPU (8 a node, unless sbatch is told otherwise). The run's directory
must be on a file system that all nodes see. 120 s before the time is up the run saves; requeued with --resume, it goes on.

  PYTHON=...   the interpreter (python): that of your environment
  --dry-run    prints the command and runs nothing
END
}

dry_run=no
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=yes; shift ;;
esac
if [ $# = 0 ]; then
  echo "error: nothing to run; give a module, such as kdsearch_jax.search --resume" >&2
  exit 2
fi
# No --gpus-per-task: all GPUs of a node stay visible to each task, and JAX uses the one with its local number.
command=(srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m "$@")
if [ "$dry_run" = yes ]; then
  printf -v line '%q ' "${command[@]}"
  printf '%s\n' "${line% }"
else
  exec "${command[@]}"
fi
