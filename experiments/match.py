"""Matches queries: `python -m experiments.match --queries=party --database=out/people --top_k=3`.

Expected on two CPU cores: 0.1 s a query photo, after half a minute of compilation in the first run.
"""

from afr_jax.core import program
from afr_jax.recognition.tasks import match_queries

if __name__ == "__main__":
    program.main(match_queries.MatchConfig, match_queries.run)
