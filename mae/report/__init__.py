"""Pages, figures and tables of runs and sweeps."""
