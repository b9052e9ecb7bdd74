"""One small file a task; `TASKS` names them."""
