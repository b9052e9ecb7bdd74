"""One small file a task; `TASKS` names them.

A trained task is a module: `forward(batch)` gives a dict with `loss`, `evaluate(batches, ranks)` a dict
of metrics, and `model` is what a checkpoint holds. The others have `run()`.
"""

from mae.tasks.pretrain import Pretrain

TASKS = {"pretrain": Pretrain}
