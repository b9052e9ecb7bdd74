"""Lays out a W&B project as a saved workspace: `python -m mae.dashboard ENTITY PROJECT`; needs extra `workspace`."""

import sys
from typing import TYPE_CHECKING, Any

from mae.errors import UserError
from mae.program import usage_name

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

RATIOS = "task.mask_ratio"


def workspace(entity: str, project: str) -> "Workspace":
    """The dashboard, not saved yet. Raises UserError without the package."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(
            "The dashboard needs the package wandb-workspaces: pip install 'mae-experiments[workspace]'."
        ) from error

    def line(title: str, *metrics: str, regex: str | None = None, **options: Any) -> "panels.LinePlot":
        return panels.LinePlot(title=title, x="images_seen", y=list(metrics), metric_regex=regex, **options)

    ratio, column = panels.Config(RATIOS), vars(panels)["ParallelCoordinatesPlotColumn"]  # public, but not in __all__
    sections = {
        "Loss": [
            line("training loss", "loss", smoothing_factor=0.5),
            line("masked validation loss", "val/loss"),
            line("masked validation loss at several ratios", regex="val/loss_at_.*"),
            line("masked validation loss by the ratio of pre-training", "val/loss", groupby=ratio),
        ],
        "Accuracy": [line("top-1", "val/top1"), line("top-5", "val/top5"), line("k-NN", regex="val/knn_.*")],
        "Pictures": [panels.MediaBrowser(media_keys=["reconstruction"]), panels.MediaBrowser(media_keys=["confusion"])],
        "Optimization": [
            line("learning rate", "lr"),
            line("learning rate of each layer", regex="lr/layer_.*", log_y=True),
            line("gradient norm of each block", regex="grad_norm/.*", log_y=True),
            line("weight norm of each block", regex="weight_norm/.*"),
            line("AMP scale", "amp_scale", log_y=True),
        ],
        "Throughput": [
            line("images a second", "images_per_second"),
            line("share of time waiting for data", "data_wait"),
            line("memory, MB", "memory_mb"),
        ],
        "Sweeps": [
            panels.ScatterPlot(title="top-1 by mask ratio", x=ratio, y=panels.SummaryMetric("top1")),
            panels.ParallelCoordinatesPlot(
                columns=[
                    column(ratio),
                    column(panels.Config("optimizer.base_lr"), log=True),
                    column(panels.Config("optimizer.layer_decay")),
                    column(panels.SummaryMetric("top1")),
                ]
            ),
        ],
    }
    layout = [workspaces.Section(name=name, panels=[*row], is_open=True) for name, row in sections.items()]
    return workspaces.Workspace(entity=entity, project=project, name="Masked autoencoders", sections=layout)


def main(arguments: list[str] | None = None) -> int:
    """Saves the dashboard and prints its address; returns the exit code."""
    names = sys.argv[1:] if arguments is None else arguments
    if len(names) != 2:
        sys.stderr.write(f"{usage_name('dashboard', 'workspace')} ENTITY PROJECT saves a dashboard in a W&B project.\n")
        return 2
    try:
        saved = workspace(*names).save()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except Exception as error:
        sys.stderr.write(f"W&B did not take the dashboard: {str(error).splitlines()[0]}\n")
        return 1
    sys.stdout.write(f"{saved.url}\n")
    return 0
