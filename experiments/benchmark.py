r"""Measures speed and results beside other people's implementations, on the same inputs.

    python -m experiments.benchmark --reference_python=reference/bin/python
    python -m experiments.benchmark --rows=detector_agreement --images=photos \
        --reference_python=reference/bin/python

experiments/reference/README.md says how to make that environment.
"""

from afr_jax.benchmark import program as benchmark
from afr_jax.core import program

if __name__ == "__main__":
    program.main(benchmark.BenchmarkConfig, benchmark.run)
