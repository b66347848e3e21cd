"""The local page for people: `python -m experiments.app`, then open the address that it prints.

Expected: the first cloak of the sample portrait takes 44 seconds of processor time, compilation
included.
"""

from afr_jax.app import app_program
from afr_jax.core import program

if __name__ == "__main__":
    program.main(app_program.AppConfig, app_program.run)
