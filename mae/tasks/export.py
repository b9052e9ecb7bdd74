"""Export of a checkpoint, ours or another's, to a file of another library."""

import logging
import time
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from mae.config import call
from mae.models.export import export as write
from mae.models.export_card import Facts, run_facts
from mae.models.foreign import read
from mae.models.foreign_fit import fit
from mae.models.mae import MaskedAutoencoder
from mae.tasks.common import kept_classes, need_init
from mae.tasks.evaluate import load_classifier

log = logging.getLogger(__name__)


def export(
    run: Path,
    cfg: DictConfig,
    ranks: Any,
    tracker: Any,
    *,
    format: Literal["timm", "huggingface", "reference", "safetensors", "onnx", "torch_export"],
    path: str | None,
) -> dict[str, Any]:
    """Writes the model that `init` names, and a card about it, to `path`; null: `export/FORMAT` in the run."""
    begun = time.perf_counter()
    tracker.start(0, 0)
    written: list[Path] = []
    if ranks.main:
        foreign = read(need_init(cfg))
        known = run_facts(cfg.init)
        classes: list[str] = []
        with torch.no_grad():
            if foreign.head is not None:
                model = load_classifier(cfg, foreign, foreign.head.classes)
                names = kept_classes(cfg.init) or []
                classes = names if len(names) == foreign.head.classes else []
            else:
                task = known.get("config", {}).get("task", {})
                model = call(MaskedAutoencoder, cfg.model, norm_pix_loss=task.get("norm_pix_loss", True))
                fit(model, foreign)
        model.eval()
        facts = Facts(
            name=cfg.model.name,
            source=foreign.kind,
            mean=list(cfg.data.mean),
            std=list(cfg.data.std),
            classes=classes,
            **known,
        )
        written = write(model, format=format, path=path or str(run / "export" / format), facts=facts)
        log.info("wrote %s", ", ".join(str(file) for file in written))
    ranks.barrier()
    return {
        "task": "export",
        "steps": 0,
        "epochs": 0,
        "images_seen": 0,
        "seconds": round(time.perf_counter() - begun, 2),
        "images_per_second": None,
        "checkpoint": cfg.init,
        "files": [str(file) for file in written],
    }
