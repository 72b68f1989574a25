#!/bin/bash
# Two ranks of eight threads on each node; at most eight cores are lent on all nodes together.
# rfaas slurm script --nodes 2 --ntasks 4 --threads 8 --time 2:00:00 --mpi pmi2 --workers 8 app.py
#SBATCH --nodes=2
#SBATCH --ntasks=4
#SBATCH --time=2:00:00
#SBATCH --exclusive

export OMP_NUM_THREADS=8
exec rfaas slurm run --workers 8 --mpi pmi2 -- python app.py
