"""Where a run runs: this process, this machine, a cluster."""
