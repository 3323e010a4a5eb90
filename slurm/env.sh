# Everything that differs from site to site, sourced by every job of this folder. Uncomment and change; submit.py copies it with the code.

# ---- software: modules, a virtual environment, or an image ----------------------------------------------------------------------
# module purge
# module load cuda gcc
# source /path/to/venv/bin/activate

# The Python that runs megarat. submit.py passes its own; an activated environment or an image decides otherwise.
: "${MEGARAT_PYTHON:=python3}"

# An image. Apptainer is a command before the program; enroot (through pyxis) is an option of srun.
# export MEGARAT_CONTAINER="apptainer exec --nv --bind $PWD /path/to/megarat.sif"
# export MEGARAT_SRUN_OPTIONS="--container-image=/path/to/megarat.sqsh --container-mounts=$PWD:$PWD --container-workdir=$PWD"
export ENROOT_FORCE_OVERRIDE=yes   # under pyxis a start replaces what a step that was killed has left on a node, and does not fail because of it

# ---- processes ------------------------------------------------------------------------------------------------------------------
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not read the job's own since Slurm 22.05

# Seconds that the other ranks get to end by themselves after the first one has.
: "${MEGARAT_RANK_WAIT:=60}"

# ---- caches on the node's own disk: compilers write many small files, which shared file systems are slow at -------------------------
megarat_cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/megarat-$(id -u)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$megarat_cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$megarat_cache/inductor}
# Remote shards are fetched into data.cache: name a folder on the node's disk in the config, such as $TMPDIR/shards.

# ---- NCCL -----------------------------------------------------------------------------------------------------------------------
# export NCCL_DEBUG=WARN                       # INFO shows which links are taken; look once on a new cluster
# export NCCL_SOCKET_IFNAME=ib0                # the interface of the first handshake, where several are up: ip -br link
# export NCCL_IB_HCA=mlx5                      # InfiniBand or RoCE adapters: ibv_devinfo -l
# export NCCL_IB_GID_INDEX=3                   # RoCE v2 on most Mellanox adapters: show_gids
# export NCCL_IB_TIMEOUT=22                    # large fabrics with adaptive routing
# export NCCL_NVLS_ENABLE=0                    # NVLink multicast: where it is not allowed to jobs, NCCL hangs at start
# export GLOO_SOCKET_IFNAME=$NCCL_SOCKET_IFNAME
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1       # a lost peer ends the other ranks, instead of leaving them waiting
export TORCH_NCCL_DUMP_ON_TIMEOUT=1            # and leaves a trace of what each was doing

# ---- the check of every node before each start --------------------------------------------------------------------------------------
# export MEGARAT_HEALTH=node                   # each node alone; off: no check; full (the default): also GPU memory and an all-reduce
# export MEGARAT_HEALTH_SECONDS=120            # that this all-reduce may take, once the ranks have imported what they need
# export MEGARAT_HEALTH_COMMAND="dcgmi diag -r 1"    # the site's own, run on every node as well; the node is bad when it fails

# ---- a job that hangs ---------------------------------------------------------------------------------------------------------------
# Seconds without a sign of life after which the ranks are killed and the job is requeued: for what guard.hang_minutes of the config (30 by
# default), by which ranks end themselves and leave their stacks, cannot see. A start, a pair and a checkpoint must be shorter.
: "${MEGARAT_HANG:=2400}"

export MEGARAT_PYTHON MEGARAT_RANK_WAIT MEGARAT_HANG
