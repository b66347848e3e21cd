r"""Runs a program with all combinations of some flags, as an array job, and collects the results.

    python -m experiments.sweep --program=train_victim --arguments="--data=photos --toy" \
        --axis=seed=0,1,2 --axis=epochs=10,20 --workdir=out/sweep
    sbatch --array=0-5 launch/slurm.sbatch @out/sweep/commands
    python -m experiments.sweep --workdir=out/sweep --collect

Writing and collecting take a second or two; --cell=N takes what its program takes.
"""

from afr_jax.core import program
from afr_jax.core.runtime import sweep

if __name__ == "__main__":
    program.main(sweep.SweepConfig, sweep.run)
