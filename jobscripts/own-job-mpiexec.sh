#!/bin/bash
# Ranks on one core of each node, workers on the others. MPICH's or Open MPI's own mpiexec starts the ranks.
# rfaas slurm script --nodes 2 --ntasks 2 --time 30 --launcher mpiexec app.py
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --time=30
#SBATCH --exclusive

exec rfaas slurm run --launcher mpiexec -- python app.py
