"""The tracker that writes TensorBoard's event files."""

from collections.abc import Mapping
from pathlib import Path

from mae.tracking.base import Tracker, step_of


class TensorBoard(Tracker):
    """Event files in `tensorboard/`. On resume, the entries after the checkpoint are purged."""

    def __init__(self, run: Path):
        self.folder, self.writer, self.step = run / "tensorboard", None, 0

    def start(self, step: int, steps: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.step = step
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else 0)  # 0: all of a lost start

    def log(self, metrics: Mapping[str, object]) -> None:
        self.step = step_of(metrics)
        for name, value in metrics.items():
            if self.writer is not None and isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name, value, self.step)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        import numpy as np
        from PIL import Image

        if self.writer is not None:
            with Image.open(path) as image:
                self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            self.writer.add_text(name, caption, step)

    def event(self, text: str, step: int | None) -> None:
        if self.writer is not None:
            self.writer.add_text("events", text, self.step if step is None else step)

    def finish(self, summary: Mapping[str, object], failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()
