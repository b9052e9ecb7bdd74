"""Heads of segmentation: from an encoder's patch tokens to a map of logits."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError

STAGES = 4  # blocks that a decoder of several resolutions reads
COARSEST = 32  # pixels of the image for one of DPT's coarsest features
UPERNET_WIDTH = 512  # channels, as in mmsegmentation on ResNets; BEiT's code has as many as the encoder
CONV_SEG_STD = 0.01  # mmsegmentation's BaseDecodeHead: normal_init of conv_seg


class DecodeHead(nn.Module):
    """A head that reads the tokens after some of the encoder's blocks. A subclass sets `blocks`."""

    blocks: Sequence[int]  # numbers of the blocks, rising
    batch_norm = False  # whether it normalises over a batch in training
    smallest_batch = 1  # images that one device must hold at a time in training
    unit = 1  # pixels of which an image's sides must be multiples, beside whole patches
    smallest_grid = 2  # patches along a side of an image that is computed by an exported graph
    reads_class_token = False
    normed = False  # whether it reads tokens after the encoder's `norm`; else the segmenter has none

    def __init__(self, encoder: VisionTransformer, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, features: list[Tensor], prefixes: list[Tensor]) -> Tensor:
        """Patch tokens (B, D, h, w) and class tokens (B, P, D) of each block to logits (B, classes, h', w')."""
        raise NotImplementedError


class LinearHead(DecodeHead):
    """One linear layer on each patch token after `norm`: the probe."""

    normed = True

    def __init__(self, encoder: VisionTransformer, num_classes: int):
        super().__init__(encoder, num_classes)
        self.blocks = [len(encoder.blocks) - 1]
        self.conv_seg = nn.Conv2d(encoder.embed_dim, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=CONV_SEG_STD)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor], prefixes: list[Tensor]) -> Tensor:
        return self.conv_seg(features[0])


class DPTHead(DecodeHead):
    """The dense prediction transformer's decoder (Ranftl et al., arXiv 2103.13413), segmentation-models-pytorch's.

    Its tensors have the names that `smp.DPT` gives them. Raises UserError where the library is missing, or the image's
    sides are no multiple of 32, or the patch's side is no power of 2.
    """

    batch_norm, reads_class_token, unit = True, True, COARSEST

    def __init__(self, encoder: VisionTransformer, num_classes: int):
        super().__init__(encoder, num_classes)
        smp_decoder, initialization = _library("decoders.dpt.decoder"), _library("base.initialization")
        patch, image = encoder.patch_embed.patch_size, encoder.patch_embed.img_size
        assert isinstance(patch, tuple) and isinstance(image, tuple)
        if patch[0] != patch[1] or patch[0] & (patch[0] - 1) or any(side % COARSEST for side in image):
            raise UserError(
                f"task.head=dpt needs square patches of a power of 2 and image sides that are multiples of {COARSEST}, "
                f"got model.patch_size={patch[0]} and model.img_size={max(image)}: choose task.head=linear."
            )
        self.blocks = evenly(len(encoder.blocks))
        self.decoder = smp_decoder.DPTDecoder(
            encoder_out_channels=[encoder.embed_dim] * STAGES,
            encoder_output_strides=[patch[0]] * STAGES,
            encoder_has_prefix_tokens=encoder.num_prefix_tokens > 0,
        )
        self.segmentation_head = smp_decoder.DPTSegmentationHead(256, num_classes)  # the decoder's own width
        initialization.initialize_decoder(self.decoder)
        initialization.initialize_head(self.segmentation_head)

    def forward(self, features: list[Tensor], prefixes: list[Tensor]) -> Tensor:
        return self.segmentation_head(self.decoder(features, prefixes))


class UPerNetHead(DecodeHead):
    """UPerNet (Xiao et al., arXiv 1807.10221), segmentation-models-pytorch's, on a pyramid of the patch tokens.

    The pyramid is that of BEiT's code, which the paper follows (A.4): features of 4, 2, 1 and 1/2 times the grid.
    """

    batch_norm = True
    smallest_grid = 4  # half of it is pooled
    smallest_batch = 2  # its coarsest pool is one value an image

    def __init__(self, encoder: VisionTransformer, num_classes: int):
        super().__init__(encoder, num_classes)
        upernet, initialization = _library("decoders.upernet.decoder"), _library("base.initialization")
        depth, dim = len(encoder.blocks), encoder.embed_dim
        thirds = sorted({depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1})  # BEiT: 3, 5, 7, 11 of 12
        self.blocks = thirds if len(thirds) == STAGES and thirds[0] >= 0 else evenly(depth)
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim, 2, 2),
                    nn.BatchNorm2d(dim),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim, dim, 2, 2),
                ),
                nn.ConvTranspose2d(dim, dim, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2),
            ]
        )
        # the decoder passes over the first two, which are of full and half resolution elsewhere
        self.decoder = upernet.UPerNetDecoder([0, 0, *[dim] * STAGES], encoder_depth=5, decoder_channels=UPERNET_WIDTH)
        self.segmentation_head = _library("base.heads").SegmentationHead(UPERNET_WIDTH, num_classes, kernel_size=1)
        initialization.initialize_decoder(self.decoder)
        initialization.initialize_head(self.segmentation_head)

    def forward(self, features: list[Tensor], prefixes: list[Tensor]) -> Tensor:
        levels = [level(feature) for level, feature in zip(self.pyramid, features, strict=True)]
        return self.segmentation_head(self.decoder([features[0], features[0], *levels]))


def evenly(depth: int) -> list[int]:
    """Numbers of four blocks, evenly spaced up to the last. Raises UserError where there are fewer."""
    if depth < STAGES:
        raise UserError(f"this task.head reads {STAGES} blocks, and model.depth={depth}: choose task.head=linear.")
    return [depth * (k + 1) // STAGES - 1 for k in range(STAGES)]


def _library(module: str) -> ModuleType:
    """A module of segmentation-models-pytorch. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(f"segmentation_models_pytorch.{module}")
    except ImportError as error:
        raise UserError(
            "task.head=dpt and upernet need the package segmentation-models-pytorch: "
            "pip install 'mae-experiments[segment]'."
        ) from error


DECODE_HEADS: dict[str, type[DecodeHead]] = {"linear": LinearHead, "dpt": DPTHead, "upernet": UPerNetHead}
