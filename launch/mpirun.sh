#!/bin/sh
# Run a command as N ranks of this machine under mpirun:  launch/mpirun.sh N command [arguments]
set -eu
[ $# -ge 2 ] || { echo "usage: $0 N command [arguments]" >&2; exit 2; }
ranks=$1; shift
program=$(command -v "$1") || { echo "$0: no command $1" >&2; exit 127; }
here=$(dirname "$program")                     # the mpirun beside the python that will run: a bare
[ -x "$here/mpirun" ] || here=$(dirname "$(command -v mpirun)")  # one may be another MPI's

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # N ranks of N threads each starve one another
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe  # more ranks than cores is fine here

exec "$here/mpirun" --bind-to none -n "$ranks" "$@"
