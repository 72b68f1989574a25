#!/bin/bash
# Ranks on one core of each node, workers on the others. MPICH finds its ranks by PMI 2.
# rfaas slurm script --nodes 2 --ntasks 2 --time 30 --mpi pmi2 app.py
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --time=30
#SBATCH --exclusive

exec rfaas slurm run --mpi pmi2 -- python app.py
