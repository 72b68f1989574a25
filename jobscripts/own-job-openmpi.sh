#!/bin/bash
# The same with Open MPI, which finds its ranks by PMIx.
# rfaas slurm script --nodes 2 --ntasks 2 --time 30 --mpi pmix app.py
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --time=30
#SBATCH --exclusive

exec rfaas slurm run --mpi pmix -- python app.py
