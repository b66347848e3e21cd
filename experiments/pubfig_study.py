"""One cloaked photo in a person's folder: which extractors still match it with the person?

    python -m experiments.pubfig_study --data=people --people=3 --workdir=out/pubfig

Expected on two busy CPU cores: half a second a photo with four extractors, beside the cloaks; 181
photos of LFW took two and a half minutes in all. --toy: 20 seconds.
"""

from afr_jax.core import program
from afr_jax.evaluation.cloaking import pubfig_study

if __name__ == "__main__":
    program.main(pubfig_study.PubFigConfig, pubfig_study.run)
