"""What lies in a run's directory. Imports no torch."""
