"""Faces beside their cloaks of several budgets, enlarged.

    python -m experiments.studies.mode_sheet --images=photos --workdir=out/sheet

Expected on two CPU cores: ten seconds a face and budget.
"""

from afr_jax.core import program
from afr_jax.evaluation.cloaking import mode_sheet

if __name__ == "__main__":
    program.main(mode_sheet.ModeSheetConfig, mode_sheet.run)
