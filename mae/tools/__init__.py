"""Commands beside training: the plan, its cost, searches, a W&B workspace."""
