"""Looks through a collection of photos: `python -m experiments.collect --data=scraped`.

Expected on two CPU cores: about 1.5 ms for a crop of 112 px, 10 ms for a photo of a megapixel.
"""

from afr_jax.core import program
from afr_jax.recognition.tasks import collect_photos

if __name__ == "__main__":
    program.main(collect_photos.CollectConfig, collect_photos.run)
