"""Time and device hours of the paper's recipes on eight A100 and eight H100, computed from their operations.

python benchmarks/recipes.py > docs/cost.md
"""

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mae.config.check import check_config, resolve  # noqa: E402
from mae.tools import dry_run  # noqa: E402

PEAK = {"8 x A100": 312e12, "8 x H100": 989e12}  # dense bf16, from NVIDIA's data sheets
UTILISATION = (0.35, 0.5)
RECIPES = {
    f"{task}, {model}{', 1600 epochs' if more else ''}": [f"task={task}", f"model={model}", *more]
    for task, more in (("pretrain", []), ("pretrain", ["task.epochs=1600"]), ("finetune", []), ("linprobe", []))
    for model in ("vit_base", "vit_large", "vit_huge")
}


def work_of(overrides: list[str]) -> tuple[float, float, float]:
    """(epochs, operations of an image in training, operations of the run)."""
    cfg = check_config(resolve(compose("config", [*overrides, "data=imagenet", "dry_run=true"])))
    plan = dry_run.plan_of(cfg)
    _, work = dry_run.operations(cfg, dry_run.model_on_meta(cfg))
    return plan.steps / plan.steps_per_epoch, work, plan.images_seen(plan.steps) * work


def main() -> None:
    heads = [f"{name} at {part:.0%}" for name in PEAK for part in UTILISATION]
    print("# Time of the paper's recipes on ImageNet-1k\n")
    print(
        "Hours, **computed, not measured**: `python benchmarks/recipes.py > docs/cost.md`. They are the operations "
        "of a step over what eight devices compute: the peak of dense bf16 products (A100 312, H100 989 TFLOP/s) "
        "times the share of it that a step reaches. A training step has three times the operations of a forward "
        "pass, a probe's has one. A loader that keeps up is taken for granted. "
        "For another device or a price: `python run.py dry_run=true model=vit_large data=imagenet "
        "launcher.processes=8 estimate.tflops=312 estimate.cost_per_hour=2`.\n"
    )
    print(f"| recipe | epochs | GFLOPs an image | {' | '.join(heads)} |")
    print(f"|---|---|---|{'---|' * len(heads)}")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name, overrides in RECIPES.items():
            epochs, of_image, of_run = work_of(overrides)
            rates = [8 * peak * part for peak in PEAK.values() for part in UTILISATION]
            times = " | ".join(f"{of_run / rate / 3600:.1f}" for rate in rates)
            print(f"| {name} | {epochs:g} | {of_image / 1e9:.1f} | {times} |")


if __name__ == "__main__":
    main()
