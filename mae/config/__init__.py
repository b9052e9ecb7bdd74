"""From YAML and the command line to a checked config. Imports no torch."""
