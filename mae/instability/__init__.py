"""The first step of a run that is not finite: what is left of it, what it shows, and how it is run again."""
