#!/bin/sh
# Run a command as N ranks of this machine under torchrun:  launch/torchrun.sh N command [arguments]
set -eu
[ $# -ge 2 ] || { echo "usage: $0 N command [arguments]" >&2; exit 2; }
ranks=$1; shift
program=$(command -v "$1") || { echo "$0: no command $1" >&2; exit 127; }
here=$(dirname "$program")                     # the torchrun beside the python that will run
[ -x "$here/torchrun" ] || here=$(dirname "$(command -v torchrun)")

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # N ranks of N threads each starve one another
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1

exec "$here/torchrun" --standalone --nproc-per-node "$ranks" --no-python "$@"
