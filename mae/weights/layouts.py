"""State dicts of other libraries: recognised by their names, and converted to the reference's."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mae.errors import UserError
from mae.weights.huggingface import BLOCK_LAYERS, OTHER_LAYERS
from mae.weights.names import State

Args = Mapping[str, object]  # the command line that a training script saved with its weights
# Names of a decoder's tensors begin with these: the reference's, CrossMAE's, and of what a decoder predicts
DECODER = ("mask_token", "decoder_", "wfm.", "dec_norms.", "target.")
CHUNKED_BLOCK = r"^blocks\.(\d+)\.(\d+)\.(norm|attn|mlp|ls)"
BLOCK_NAME = r"blocks\."
KNOWN_IN_BLOCK = r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
SINUSOID = "sinusoid"  # a position table that is computed from the row's number, not stored


class Layout(NamedTuple):
    """A state dict under the reference's names, and who wrote it."""

    family: str
    state: State
    notes: list[str]
    position: str = ""  # SINUSOID where the position embedding is not stored


def convert(tensors: State, args: Args, path: str) -> Layout:
    """Recognises a layout and converts it. Raises UserError naming `path` where none is recognised."""
    layout = next((make for sign, make in LAYOUTS if any(re.search(sign, name) for name in tensors)), None)
    if layout is None:
        raise UserError(
            f"init={path} holds no vision transformer that is known here: its tensors begin with "
            f"{', '.join(list(tensors)[:4])}. Known are the names of this project, facebookresearch/mae, timm, "
            "Hugging Face ViT and ViTMAE, shiyuwuCASIA/MAE-repo and pengzhiliang/MAE-pytorch."
        )
    try:
        converted = layout(dict(tensors), args)
        state = _bare(converted.state)
        if "patch_embed.proj.weight" not in state:
            raise KeyError("the patch projection's weight")
    except KeyError as error:
        raise UserError(f"init={path} is incomplete: it lacks {error.args[0]}.") from error
    except ValueError as error:
        raise UserError(f"init={path}: {error}") from error
    if strange := [name for name in state if re.match(BLOCK_NAME, name) and not re.fullmatch(KNOWN_IN_BLOCK, name)]:
        raise UserError(
            f"init={path} is another kind of network than is computed here: no block here has {strange[0]}."
        )
    if "pos_embed" not in state and not converted.position:
        raise UserError(
            f"init={path} is another kind of network than is computed here: it has no table of position embeddings, "
            "so its positions are relative, rotary or none."
        )
    return converted._replace(state=state)


# ---------------------------------------------------------------- helpers


def _bare(state: State) -> State:
    """LayerScale folded into the matrix before it and absent qkv biases made zeros: the same function."""
    for name in [n for n in state if re.search(r"\.(ls|gamma_)[12](\.gamma)?$", n)]:
        gamma, (block, _, kind) = state.pop(name).float(), re.split(r"\.(ls|gamma_)", name)
        matrix = f"{block}.attn.proj" if kind[0] == "1" else f"{block}.mlp.fc2"
        state[f"{matrix}.weight"] = gamma[:, None] * state[f"{matrix}.weight"].float()
        state[f"{matrix}.bias"] = gamma * state[f"{matrix}.bias"].float()
    weights = [n for n in state if n.endswith("attn.qkv.weight")]
    if not any(n.endswith("attn.qkv.bias") for n in state):
        for name in weights:
            state[name.replace("weight", "bias")] = state[name].new_zeros(state[name].shape[0])
    return state


def _rename(state: State, rules: Iterable[tuple[str, str]]) -> State:
    """Each name with the first rule that matches it applied."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    renamed = {}
    for name, tensor in state.items():
        renamed[next((p.sub(new, name, count=1) for p, new in compiled if p.search(name)), name)] = tensor
    return renamed


def _fuse_qkv(state: State) -> State:
    """Separate `attn.q.* attn.k.* attn.v.*` joined into `attn.qkv.*`."""
    for name in [n for n in state if re.search(r"attn\.q\.(weight|bias)$", n)]:
        names = [name.replace("attn.q.", f"attn.{letter}.") for letter in "qkv"]
        if missing := [other for other in names if other not in state]:
            raise UserError(f"it is incomplete, having {name} but not {', '.join(missing)}.")
        state[name.replace("attn.q.", "attn.qkv.")] = torch.cat([state.pop(other) for other in names])
    return state


def with_class_row(table: Tensor) -> Tensor:
    """Position embedding (1, L, D) with a row of zeros put first: adding nothing to the class token."""
    table = table.reshape(1, -1, table.shape[-1])
    return torch.cat([table.new_zeros(1, 1, table.shape[-1]), table], dim=1)


def sinusoid(rows: int, dim: int) -> Tensor:
    """Position table (1, rows, dim) of the first Transformer, sine and cosine in turn (MAE-pytorch's)."""
    angle = torch.arange(rows, dtype=torch.float64)[:, None]
    angle = angle / 10000.0 ** (2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]


# ---------------------------------------------------------------- the layouts


def _native(state: State, args: Args) -> Layout:
    """This project's, the reference's, timm's and DINOv2's: the names are ours already.

    DINOv2's `block_chunks` puts blocks into groups (`blocks.GROUP.NUMBER.`); a number counts all blocks.
    """
    groups: dict[str, set[str]] = {}
    for name in state:
        if chunk := re.match(CHUNKED_BLOCK, name):
            groups.setdefault(chunk[2], set()).add(chunk[1])
    if any(len(held) > 1 for held in groups.values()):
        raise UserError("its blocks stand in groups that number them anew, which is another kind of network.")
    return Layout("timm", _rename(state, [(CHUNKED_BLOCK, r"blocks.\2.\3")]), [])


_HF_BLOCK = [(f"(?:{'|'.join(map(re.escape, theirs))})\\.", f"{ours}.") for ours, theirs in BLOCK_LAYERS.items()]
_HF_REST = [(rf"^(vit\.)?{re.escape(theirs)}(?=\.|$)", ours) for ours, theirs in OTHER_LAYERS.items()] + [
    (r"^(vit\.)?(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
]


def _huggingface(state: State, args: Args) -> Layout:
    """transformers' ViT and ViTMAE, old (4.x, as on the hub) and new (5.x) names."""
    notes = []
    for name in [n for n in state if re.search(r"(^|\.)pooler\.|embeddings\.mask_token$|^decoder\.0\.", n)]:
        state.pop(name)
        notes.append(f"{name} is left out: no model here has it.")
    mae = any(name.startswith("decoder.") for name in state)
    state = _fuse_qkv(_rename(_rename(state, _HF_BLOCK), _HF_REST))
    return Layout("Hugging Face ViTMAE" if mae else "Hugging Face ViT", state, notes)


_SEED = (
    (r"^decoder\.encoder_list\.", "decoder_blocks."),
    (r"^encode_norm\.", "norm."),
    (r"^decoder_pred\.0\.", "decoder_norm."),
    (r"^decoder_pred\.1\.", "decoder_pred."),
    (r"^decoder_mask_token$", "mask_token"),
    (r"^mlp_head\.", "head."),
)
_SEED_BLOCK = (
    (r"enc_self_attn\.W_Q\.", "attn.q."),
    (r"enc_self_attn\.W_K\.", "attn.k."),
    (r"enc_self_attn\.W_V\.", "attn.v."),
    (r"enc_self_attn\.proj\.", "attn.proj."),
    (r"enc_ffn\.fc\.0\.", "mlp.fc1."),
    (r"enc_ffn\.fc\.2\.", "mlp.fc2."),
    (r"layernorm1\.", "norm1."),
    (r"layernorm2\.", "norm2."),
)


def _seed(state: State, args: Args) -> Layout:
    """shiyuwuCASIA/MAE-repo: separate q, k, v, a linear patch projection, no class row in its tables.

    Its tables are row first and sine and cosine in turn. A table is added to the same channels that the
    weights around it were trained with, so its channels stay in their order: moving them alone would compute
    another function. The projection (D, p * p * C) in (row, column, channel) order becomes a convolution's.
    """
    state = _fuse_qkv(_rename(_rename(state, _SEED_BLOCK), _SEED))
    weight = state["patch_embed.proj.weight"]
    if weight.ndim == 2:
        patch, chans = _seed_patch(weight.shape[1], args)
        weight = weight.reshape(-1, patch, patch, chans).permute(0, 3, 1, 2).contiguous()
        state["patch_embed.proj.weight"] = weight
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state:
            state[name] = with_class_row(state[name])
    notes = [
        "Its linear patch projection became a convolution. Its position tables got a class row of zeros and "
        "keep their own channel order, which its weights belong to.",
        "Its last LayerNorms had eps 1e-5 where all of ours have 1e-6.",
    ]
    return Layout("MAE-repo (shiyuwuCASIA)", state, notes)


def _seed_patch(values: int, args: Args) -> tuple[int, int]:
    """Patch side and channels of a flat projection of so many values a patch; 3 channels if nothing tells."""
    for chans in (args.get("channel"), 3, 1, 4, 2):
        if isinstance(chans, int) and chans and values % chans == 0:
            side = math.isqrt(values // chans)
            if side**2 == values // chans:
                return side, chans
    raise UserError(f"its patches have {values} values, which no square of 1 to 4 channels has.")


_PENG = (
    (r"^encoder\.", ""),
    (r"^decoder\.blocks\.", "decoder_blocks."),
    (r"^decoder\.norm\.", "decoder_norm."),
    (r"^decoder\.head\.", "decoder_pred."),
    (r"^encoder_to_decoder\.", "decoder_embed."),
)


def _mae_pytorch(state: State, args: Args) -> Layout:
    """pengzhiliang/MAE-pytorch: no class token, computed 1-D position tables, biases of q and v alone."""
    state = _rename(state, _PENG)
    for name in [n for n in state if n.endswith(".attn.q_bias")]:
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    notes = []
    if "decoder_embed.weight" in state:
        state["decoder_embed.bias"] = state["decoder_embed.weight"].new_zeros(state["decoder_embed.weight"].shape[0])
        notes.append("Its decoder predicts pixels normalised by patch and channel, not by patch.")
    position = "" if "pos_embed" in state else SINUSOID
    return Layout("MAE-pytorch (pengzhiliang)", state, notes, position)


LAYOUTS: tuple[tuple[str, Callable[[State, Args], Layout]], ...] = (
    (r"embeddings\.patch_embeddings\.projection\.", _huggingface),
    (r"enc_self_attn\.W_Q\.", _seed),
    (r"^encoder\.patch_embed\.|^encoder_to_decoder\.|^blocks\.0\.attn\.q_bias$", _mae_pytorch),
    (r"^patch_embed\.proj\.weight$", _native),
)
