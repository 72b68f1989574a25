#!/bin/bash
# As pilots-mpich.sh with Open MPI, which finds its ranks by PMIx.
# rfaas slurm script --nodes 1 --ntasks 4 --time 30 --mpi pmix --borrow app.py
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --time=30

exec srun --mpi=pmix python app.py
