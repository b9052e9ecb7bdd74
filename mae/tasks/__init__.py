"""One small file a task; `TASKS` names them.

A trained task is a module: `forward(batch)` gives a dict with `loss`, `evaluate(batches, ranks, autocast)` a
dict of metrics, `model` is what a checkpoint holds and `trained` what the optimizer works on. The others
are functions of (run, cfg, ranks, tracker) that return the summary; `pipeline` runs where the command was typed.
"""

from mae.tasks.evaluate import evaluate
from mae.tasks.export import export
from mae.tasks.finetune import Finetune
from mae.tasks.inspect import inspect
from mae.tasks.knn import knn
from mae.tasks.linprobe import Linprobe
from mae.tasks.pretrain import Pretrain
from mae.tasks.stats import stats
from mae.tasks.visualize import visualize

TASKS = {
    "pretrain": Pretrain,
    "finetune": Finetune,
    "linprobe": Linprobe,
    "knn": knn,
    "evaluate": evaluate,
    "visualize": visualize,
    "export": export,
    "stats": stats,
    "inspect": inspect,
}
