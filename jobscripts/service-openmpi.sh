#!/bin/bash
# As service-mpich.sh with Open MPI, which finds its ranks by PMIx.
# rfaas slurm script --nodes 2 --ntasks 64 --time 1:00:00 --mpi pmix --borrow app.py
#SBATCH --nodes=2
#SBATCH --ntasks=64
#SBATCH --time=1:00:00

exec srun --mpi=pmix python app.py
