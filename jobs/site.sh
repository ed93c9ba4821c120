# shellcheck shell=bash disable=SC2034
# What a site wants: change it here, once. jobs/*.sbatch source it on the first node, from the folder
# that they were submitted in (the checkout); MPICDSGD_SITE=FILE names another file. sbatch itself
# reads SBATCH_*, so source it before sbatch too if it sets these (`mpicdsgd submit` does):
#   source jobs/site.sh && sbatch jobs/train.sbatch jobs/mnist.toml
#
# A cluster with modules, Open MPI of its own and GPUs may have:
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_GPUS_PER_NODE=4
#   module load gcc/12 openmpi/5.0 cuda/12 python/3.12
#   launcher=(srun --mpi=pmix --wait=60)     # what this Slurm offers: srun --mpi=list
#   export NCCL_DEBUG=WARN UCX_TLS=rc,self,sm,cuda

# Started by Slurm (pmi2 for MPICH, Intel MPI and the mpich wheel; pmix for Open MPI), which ends the
# job a minute after a rank has died ...
launcher=(srun --mpi=pmi2 --wait=60)
# ... or by MPI itself, which asks Slurm where (the mpich wheel over InfiniBand: docs/slurm.md):
#   launcher=(mpirun)

# Where mpicdsgd is installed. On many nodes better on their own disks than on a shared one, sent there
# as one archive (docs/slurm.md says how it is made), instead of the lines below:
#   if [ -n "${SLURM_JOB_ID-}" ]; then
#       sbcast --force /shared/env.tar /tmp/env.tar
#       srun --ntasks-per-node=1 --ntasks="$SLURM_NNODES" tar -xf /tmp/env.tar -C /tmp
#       export PATH=/tmp/env/bin:$PATH
#   fi
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
