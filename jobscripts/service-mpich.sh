#!/bin/bash
# Ranks borrow from the site's service: the job has the cores of its ranks, and no more.
# rfaas slurm script --nodes 2 --ntasks 64 --time 1:00:00 --mpi pmi2 --borrow app.py
#SBATCH --nodes=2
#SBATCH --ntasks=64
#SBATCH --time=1:00:00

exec srun --mpi=pmi2 python app.py
