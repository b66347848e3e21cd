"""The local page for people: `python -m experiments.app`, then open the address that it prints.

Expected on two idle CPU cores: the page is there within ten seconds, the first cloak of the sample
portrait within a minute, compilation included.
"""

from afr_jax.app import app_program
from afr_jax.core import program

if __name__ == "__main__":
    program.main(app_program.AppConfig, app_program.run)
