"""What the published recipes compose to, against the papers' tables written down here once more."""

import pytest
from conftest import composed
from omegaconf import OmegaConf

PRETRAIN = {
    "task.warmup_epochs": 40,
    "task.batch_size": 4096,
    "task.mask_ratio": 0.75,
    "task.norm_pix_loss": True,
    "task.clip_grad": None,
    "optimizer.name": "adamw",
    "optimizer.base_lr": 1.5e-4,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.layer_decay": None,
    "optimizer.min_lr": 0.0,
    "augmentation.name": "random_resized_crop",
    "augmentation.scale": [0.2, 1.0],
    "augmentation.hflip": True,
    "model.img_size": 224,
}
FINETUNE = {
    "task.warmup_epochs": 5,
    "task.batch_size": 1024,
    "task.mixup": 0.8,
    "task.cutmix": 1.0,
    "task.mixup_prob": 1.0,
    "task.mixup_switch_prob": 0.5,
    "task.label_smoothing": 0.1,
    "task.global_pool": "avg",
    "task.ema_decay": None,
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.min_lr": 1e-6,
    "optimizer.no_decay": ["cls_token", "pos_embed"],
    "augmentation.name": "rand_augment",
    "augmentation.policy": "rand-m9-mstd0.5-inc1",
    "augmentation.erase_prob": 0.25,
    "augmentation.scale": [0.08, 1.0],
}
LINPROBE = {
    "task.warmup_epochs": 10,
    "task.batch_size": 16384,
    "task.global_pool": "token",
    "optimizer.name": "lars",
    "optimizer.base_lr": 0.1,
    "optimizer.weight_decay": 0.0,
    "optimizer.momentum": 0.9,
    "optimizer.trust_coefficient": 0.001,
    "augmentation.name": "random_resized_crop",
    "augmentation.scale": [0.08, 1.0],
}
SCRATCH = FINETUNE | {
    "task.warmup_epochs": 20,
    "task.batch_size": 4096,
    "task.ema_decay": 0.9999,
    "optimizer.base_lr": 1e-4,
    "optimizer.weight_decay": 0.3,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.layer_decay": None,
}
CROSSMAE = PRETRAIN | {
    "task.epochs": 800,
    "task.predict_ratio": 0.75,
    "model.decoder": "cross",
    "model.mask_tokens": "decoder",
    "model.decoder_depth": 12,
}
SEGMENT = {
    "model.img_size": 512,
    "task.head": "upernet",
    "task.frozen": False,
    "task.epochs": 100,
    "task.batch_size": 16,
    "task.warmup_epochs": 1.2,
    "task.eval_size": 512,
    "augmentation.scale": [0.5, 2.0],
    "optimizer.base_lr": 1.6e-3,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": [0.9, 0.999],
}
FAST = {"task.epochs": 100, "task.warmup_epochs": 5, "task.mask_ratio": 0.9, "model.decoder_depth": 1}
SIZES = {
    "vit_small": {"model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6, "model.patch_size": 16},
    "vit_base": {"model.embed_dim": 768, "model.depth": 12, "model.num_heads": 12, "model.patch_size": 16},
    "vit_large": {"model.embed_dim": 1024, "model.depth": 24, "model.num_heads": 16, "model.patch_size": 16},
    "vit_huge": {"model.embed_dim": 1280, "model.depth": 32, "model.num_heads": 16, "model.patch_size": 14},
}
DECODER = {
    "model.decoder": "self",
    "model.decoder_embed_dim": 512,
    "model.decoder_depth": 8,
    "model.decoder_num_heads": 16,
}


def finetune(epochs: int, base_lr: float, layer_decay: float, drop_path: float) -> dict:
    numbers = {"task.epochs": epochs, "optimizer.base_lr": base_lr, "task.drop_path": drop_path}
    return FINETUNE | numbers | {"optimizer.layer_decay": layer_decay}


RECIPES = {  # command line -> what it must compose to
    "task=pretrain model=vit_base": PRETRAIN | {"task.epochs": 800},
    "task=pretrain model=vit_large": PRETRAIN | {"task.epochs": 800},
    "task=pretrain model=vit_huge": PRETRAIN | {"task.epochs": 800},
    "experiment=paper_pretrain_vit_base": PRETRAIN | {"task.epochs": 1600},
    "experiment=paper_pretrain_vit_large": PRETRAIN | {"task.epochs": 1600},
    "experiment=paper_pretrain_vit_huge": PRETRAIN | {"task.epochs": 1600},
    "experiment=colormae_pretrain_vit_base": PRETRAIN | {"task.epochs": 1600, "masking.name": "green"},
    "experiment=maskfeat_pretrain_vit_base": PRETRAIN
    | {"task.epochs": 1600, "task.warmup_epochs": 30, "task.batch_size": 2048, "task.mask_ratio": 0.4}
    | {"task.norm_pix_loss": False, "task.clip_grad": 0.02, "masking.name": "block", "target.cell": 8}
    | {"optimizer.base_lr": 2e-4, "optimizer.min_lr": 1e-6, "optimizer.betas": [0.9, 0.999]}
    | {"augmentation.scale": [0.5, 1.0], "model.decoder": "linear", "model.mask_tokens": "encoder"},
    "experiment=dailymae_pretrain_vit_base": PRETRAIN
    | {"task.epochs": 800, "task.img_size_schedule": [[0, 160, 0.5], [200, 192, 0.66], [400, 224, 0.75]]},
    "experiment=fast_pretrain_vit_base": PRETRAIN | FAST,
    "experiment=fast_growing_pretrain_vit_base": PRETRAIN
    | FAST
    | {"task.img_size_schedule": [[0, 160, 0.8], [25, 192, 0.86], [50, 224, 0.9]]},
    "experiment=seed_pretrain_vit_base": PRETRAIN | {"task.epochs": 400, "task.micro_batch_size": 128},
    "experiment=seed_pretrain_vit_large": PRETRAIN | {"task.epochs": 400},
    "task=finetune model=vit_base": finetune(100, 5e-4, 0.65, 0.1),
    "task=finetune model=vit_large": finetune(50, 1e-3, 0.75, 0.2),
    "task=finetune model=vit_huge": finetune(50, 1e-3, 0.75, 0.3),
    "experiment=paper_finetune_vit_base": finetune(100, 1e-3, 0.75, 0.1),
    "experiment=paper_finetune_vit_large": finetune(50, 1e-3, 0.75, 0.1),
    "experiment=paper_finetune_vit_huge": finetune(50, 1e-3, 0.75, 0.2),
    "experiment=seed_finetune_vit_base": finetune(100, 1e-3, 0.75, 0.1),
    "experiment=seed_finetune_vit_large": finetune(50, 1e-3, 0.75, 0.1),
    "task=linprobe model=vit_base": LINPROBE | {"task.epochs": 90},
    "task=linprobe model=vit_large": LINPROBE | {"task.epochs": 50},
    "task=linprobe model=vit_huge": LINPROBE | {"task.epochs": 50},
    "experiment=paper_linprobe_vit_base": LINPROBE | {"task.epochs": 90},
    "experiment=paper_linprobe_vit_large": LINPROBE | {"task.epochs": 50},
    "experiment=paper_linprobe_vit_huge": LINPROBE | {"task.epochs": 50},
    "experiment=crossmae_pretrain_vit_small": CROSSMAE | {"model.decoder_embed_dim": 256, "model.decoder_num_heads": 8},
    "experiment=crossmae_pretrain_vit_base": CROSSMAE,
    "experiment=crossmae_pretrain_vit_large": CROSSMAE,
    "experiment=crossmae_finetune_vit_base": finetune(100, 5e-4, 0.65, 0.1),
    "experiment=crossmae_linprobe_vit_small": LINPROBE | {"task.epochs": 90, "task.global_pool": "avg"},
    "experiment=crossmae_linprobe_vit_base": LINPROBE | {"task.epochs": 90, "task.global_pool": "avg"},
    "experiment=attentive_linprobe_vit_base": LINPROBE
    | {"task.epochs": 90, "task.batch_size": 4096, "task.probe": "attentive", "task.probe_queries": 32}
    | {"task.probe_projection": True, "task.layer": -1},
    "experiment=paper_segment_vit_base": SEGMENT | {"task.drop_path": 0.1, "optimizer.layer_decay": 0.65},
    "experiment=paper_segment_vit_large": SEGMENT | {"task.drop_path": 0.2, "optimizer.layer_decay": 0.75},
    "experiment=scratch_vit_base": SCRATCH | {"task.epochs": 300, "task.drop_path": 0.1},
    "experiment=scratch_vit_large": SCRATCH | {"task.epochs": 200, "task.drop_path": 0.2},
    "experiment=scratch_vit_huge": SCRATCH | {"task.epochs": 200, "task.drop_path": 0.2},
}


@pytest.mark.parametrize("command", sorted(RECIPES))
def test_a_published_recipe_composes_to_its_table(command, tmp_path):
    cfg = composed(*command.split(), "data=imagenet", f"data.root={tmp_path}", "launcher.processes=8")
    composed(*command.split(), "data=imagenet", f"data.root={tmp_path}", "launcher=slurm", "launcher.tasks_per_node=8")
    size = next(size for size in SIZES if size in command)
    for key, value in (SIZES[size] | DECODER | RECIPES[command]).items():
        found = OmegaConf.select(cfg, key)
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        assert found == value, f"{key}: {found}, the table says {value}"


def test_every_experiment_is_in_the_table():
    from conftest import ROOT

    named = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml") if "cifar" not in path.stem}
    assert named == {command.removeprefix("experiment=") for command in RECIPES if command.startswith("experiment=")}
