"""Names of the files and folders in a run's directory, and the number of their format. Imports no torch."""

FORMAT = 1  # of config.yaml and of a checkpoint's manifest: see `mae.config.versions`
FORMAT_KEY = "format"  # absent in what earlier versions wrote, which counts as 0
