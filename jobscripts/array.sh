#!/bin/bash
# Sixteen jobs, four at a time, each with one rank; where an option has a percent sign, Slurm fills in numbers.
# rfaas slurm script --array 0-15%4 --ntasks 1 --time 10 --output 'array-%A-%a.out' app.py
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=10
#SBATCH --array=0-15%4
#SBATCH --output=array-%A-%a.out
#SBATCH --exclusive

exec rfaas slurm run -- python app.py
