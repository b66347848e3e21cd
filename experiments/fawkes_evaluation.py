"""What cloaks are worth: surrogates x trackers x countermeasures, in one table.

    python -m experiments.fawkes_evaluation --data=people --people=10 --workdir=out/evaluation

Expected on LFW without any cloak: 0 to 2 % of the probes missed. --toy: half a minute on two CPU
cores.
"""

from afr_jax.core import program
from afr_jax.evaluation.cloaking import study

if __name__ == "__main__":
    program.main(study.FawkesEvaluationConfig, study.run)
