"""Scaling study: results of runs, the fitted law, tables and figures."""
