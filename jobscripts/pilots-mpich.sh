#!/bin/bash
# Ranks borrow from pilot jobs: submit it where what `rfaas slurm pilots` printed is set, which sbatch passes on.
# rfaas slurm script --nodes 1 --ntasks 4 --time 30 --mpi pmi2 --borrow app.py
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --time=30

exec srun --mpi=pmi2 python app.py
