"""Tools of the documentation: tables of results, the tutorial's notebook, the site's hooks."""
