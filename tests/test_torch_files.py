"""Files of `torch.save` as training scripts leave them: what lies beside the weights, and how names are wrapped."""

import argparse
import builtins
import collections
import enum
import os
import pathlib
import pickle
import subprocess
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mae.models.mae import MaskedAutoencoder
from mae.weights import names as weight_names
from mae.weights import unpickle
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

SIZES: dict[str, Any] = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0)
DECODER: dict[str, Any] = dict(
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    norm_pix_loss=True,
    decoder="self",
    mask_tokens="decoder",
)


def autoencoder(seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(**SIZES, **DECODER)


PLAIN = autoencoder().state_dict()
AVERAGED = {name: tensor + 1 for name, tensor in PLAIN.items()}
ENCODER = {name: tensor for name, tensor in PLAIN.items() if not name.startswith(("decoder", "mask_token"))}


def save(path, content, **options) -> str:
    torch.save(content, path, **options)
    return str(path)


def check_equal(state, expected=PLAIN) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------- what lies beside the weights


class Stage(enum.Enum):
    WARM = 1


class Settings:
    """An object of a training script's own class."""

    def __init__(self):
        self.weights = {"patch_embed.proj.weight": torch.zeros(1)}


class Attributes(dict):
    """A dict of a training script's own class."""


def optimizer_of_mae_pytorch() -> dict:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.param_groups[0]["lr"] = np.linspace(1, 0, 3)[1] * 1.0  # its engine writes a scheduler's numpy values
    optimizer.param_groups[0]["weight_decay"] = np.float32(0.05)
    return optimizer.state_dict()


BESIDE = {
    "numpy": lambda: [np.int64(3), np.bool_(True), np.str_("x"), np.float16(1), np.dtype("f4"), np.arange(3)],
    "dtypes": lambda: [type(np.dtype(name)) for name in ("f4", "f8", "i8", "u2", "?", "U3")],
    "optimizer": optimizer_of_mae_pytorch,
    "paths": lambda: [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("C:/a"), pathlib.Path("x")],
    "omegaconf": lambda: OmegaConf.create({"model": {"lr": 1e-3, "betas": [0.9, 0.95]}, "root": None}),
    "containers": lambda: [collections.defaultdict(dict, a=1), collections.OrderedDict(b=2), collections.Counter("aa")],
    "argparse": lambda: argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("data"), seed=np.int64(1)),
    "own classes": lambda: [Settings(), Stage.WARM, Attributes(a=1), types.SimpleNamespace(a=1), torch.optim.AdamW],
    "plain": lambda: [{1, 2}, frozenset({3}), slice(1, 2), 1 + 2j, b"bytes", bytearray(b"x"), 10**30],
}  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_the_weights_are_read_whatever_harmless_lies_beside_them(tmp_path, beside, options):
    path = save(tmp_path / "x.pth", {"model": PLAIN, "epoch": 3, "beside": BESIDE[beside]()}, **options)
    checkpoint = read_pretrained(path)
    check_equal(checkpoint.state)
    assert checkpoint.meta.epoch == 3


@pytest.mark.parametrize("name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_is_read_under_the_module_names_of_both_its_versions(tmp_path, name):
    path = tmp_path / "x.pkl"
    content = pickle.dumps(np.float64(0.5), protocol=2)
    path.write_bytes(content)
    for old in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(old, name.encode())
    loads = unpickle._reader().load
    path.write_bytes(content)
    with path.open("rb") as file:
        assert loads(file) == 0.5


def test_a_checkpoint_of_mae_pytorch_is_read_with_its_arguments(tmp_path):
    args = argparse.Namespace(input_size=16, normlize_target=True)
    content = {"model": PLAIN, "optimizer": optimizer_of_mae_pytorch(), "epoch": 0, "scaler": {}, "args": args}
    checkpoint = read_pretrained(save(tmp_path / "checkpoint-0.pth", content))
    check_equal(checkpoint.state)
    assert checkpoint.norm_pix_loss is True and checkpoint.meta.args["input_size"] == 16


def test_a_state_dict_of_numpy_arrays_is_read(tmp_path):
    check_equal(read_pretrained(save(tmp_path / "x.pth", {"model": {n: t.numpy() for n, t in PLAIN.items()}})).state)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_module_is_refused_by_its_class(tmp_path, legacy):
    path = save(tmp_path / "x.pth", {"model": autoencoder()}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"holds under 'model' an object of class mae\.models\.mae\.MaskedAutoencoder"):
        read_pretrained(path)
    path = save(tmp_path / "y.pth", autoencoder(), _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="whose code is never run: save its state_dict"):
        read_pretrained(path)


# ---------------------------------------------------------------- code


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


CALLS = {
    "posix.system": lambda file: Call(os.system, f"touch {file}"),
    "builtins.eval": lambda file: Call(builtins.eval, f"open({str(file)!r}, 'w')"),
    "builtins.exec": lambda file: Call(builtins.exec, f"open({str(file)!r}, 'w')"),
    "io.open": lambda file: Call(builtins.open, str(file), "w"),
    "subprocess.Popen": lambda file: Call(subprocess.Popen, ["touch", str(file)]),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_pythons_own_functions_is_refused_and_not_made(tmp_path, name, legacy):
    file = tmp_path / "written"
    content = {"model": PLAIN, "beside": np.float64(1), "optimizer": {"lr": CALLS[name](file)}}
    path = save(tmp_path / "x.pth", content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf"x\.pth is refused: it carries code \({name}\), which is never run"):
        read_pretrained(path)
    assert not file.exists()


def _by_hand(module: str, name: str, argument: str) -> bytes:
    """A pickle of protocol 2 that calls `module.name(argument)`."""
    text = argument.encode()
    call = f"c{module}\n{name}\n".encode() + b"X" + len(text).to_bytes(4, "little") + text + b"\x85R"
    return b"\x80\x02" + call + b"."


ALLOWED_LOOKING = [
    ("numpy._core.multiarray", "scalar.__globals__"), ("numpy.core.multiarray", "fromfile"), ("numpy", "load"),
    ("torch._utils", "_import_dotted_name"), ("torch.storage", "_load_from_bytes"), ("torch", "load"),
    ("pathlib", "Path.touch"), ("pathlib", "PosixPath.write_text"), ("collections", "OrderedDict.__init__"),
    ("argparse", "FileType"), ("functools", "partial"), ("argparse", "_os.system"), ("mae.weights.read", "read"),
    ("omegaconf", "OmegaConf.load"), ("numpy.testing._private.utils", "runstring"), ("torch.hub", "load"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), ALLOWED_LOOKING)
def test_a_name_that_looks_allowed_calls_nothing(tmp_path, module, name):
    """By the reader alone: what a name stands for is either inert, or refused."""
    file = tmp_path / "written"
    text = [module.encode(), name.encode(), str(file).encode()]
    pushed = b"".join(b"X" + len(t).to_bytes(4, "little") + t for t in text[:2])
    argument = b"X" + len(text[2]).to_bytes(4, "little") + text[2]
    for content in (
        b"\x80\x04" + pushed + b"\x93" + argument + b"\x85R.",  # a dotted name is possible from protocol 4 on
        _by_hand(module, name, str(file)),
    ):
        (tmp_path / "x.pkl").write_bytes(content)
        with (tmp_path / "x.pkl").open("rb") as opened:
            try:
                value = unpickle._reader().load(opened)
            except (unpickle._Refused, *unpickle.FAILURES):
                continue
        assert type(value).__mro__[1] is unpickle.Inert and vars(value) == {}
    assert not file.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("argparse", "Namespace")],
)
def test_a_file_cannot_change_what_others_use(tmp_path, module, name):
    """The state of a class or function, set by a pickle, would last beyond the file."""
    content = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}X\x05\x00\x00\x00stateK\x01s\x86b."
    (tmp_path / "x.pkl").write_bytes(content)
    with (tmp_path / "x.pkl").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="the state of a"):
        unpickle._reader().load(file)
    assert not hasattr(unpickle._harmless()[f"{module}.{name}"], "state")


def test_torchscript_is_not_run(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pth"))
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        read_pretrained(str(tmp_path / "x.pth"))


# ---------------------------------------------------------------- names


def compiled_blocks() -> dict:
    model = autoencoder()
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block)  # type: ignore[assignment]
    return model.state_dict()


def renamed(prefix: str, state=PLAIN) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


NESTINGS = {
    "compile(DDP)": lambda: renamed("_orig_mod.module."),
    "DDP(compile)": lambda: renamed("module._orig_mod."),
    "compiled blocks": compiled_blocks,
    "AveragedModel": lambda: AveragedModel(autoencoder()).state_dict(),
    "Lightning": lambda: {"state_dict": renamed("model."), "epoch": 3},
    "model_state": lambda: {"model_state": renamed("module.")},
    "Lightning, averaged": lambda: {"state_dict": {"loss.weight": torch.ones(3)} | renamed("net.backbone.module.")},
    "teacher": lambda: {"teacher": renamed("module.backbone."), "epoch": 3},
    "an own name": lambda: {"checkpoint": {"weights": renamed("my_vit.")}},
    "n_averaged inside": lambda: {"ema_model": AveragedModel(autoencoder()).state_dict()},
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_wrappers_are_taken_off(tmp_path, nesting):
    checkpoint = read_pretrained(save(tmp_path / "x.pth", NESTINGS[nesting]()))
    check_equal(checkpoint.state)
    model = autoencoder(1)
    assert not load_pretrained(model, checkpoint, need_decoder=True).fresh


SEGMENTS = st.sampled_from(
    [*weight_names.WRAPPERS, "model", "backbone", "encoder", "net", "student", "teacher", "vit", "own"]
)
KEYS = st.sampled_from(["model", "state_dict", "model_state", "module", "teacher", "student", "ema", "model_ema", "x"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=st.lists(SEGMENTS, max_size=4), keys=st.lists(KEYS, max_size=3), data=st.data())
def test_any_nesting_of_wrappers_gives_the_same_weights(prefix, keys, data):
    """Around the model, around each block, in dicts within dicts: the names and the bits are the model's own."""
    state = {}
    blocks = {f"{part}.{n}": data.draw(st.lists(st.sampled_from(sorted(weight_names.WRAPPERS)), max_size=2))
              for part, depth in (("blocks", 2), ("decoder_blocks", 1)) for n in range(depth)}  # fmt: skip
    for name, tensor in PLAIN.items():
        block = ".".join(name.split(".")[:2])
        inner = name.removeprefix(f"{block}.") if block in blocks else name
        state[".".join([*prefix, *([block, *blocks[block]] if block in blocks else []), inner])] = tensor
    content: dict = {**state, ".".join([*prefix, "n_averaged"]): torch.tensor(3)}
    for key in keys:
        content = {key: content, "epoch": 1, "lr": torch.tensor(0.1)}
    weights, _ = weight_names.select(content, "x.pth")
    assert weights is not None
    check_equal(weights.tensors)


@pytest.mark.parametrize(
    ("content", "label", "unread"),
    [
        (lambda: {"model_ema": AVERAGED, "model": PLAIN}, "model", "model_ema"),
        (lambda: {"state_dict_ema": AVERAGED, "state_dict": PLAIN}, "state_dict", "state_dict_ema"),
        (lambda: {"student": AVERAGED, "teacher": PLAIN}, "teacher", "student"),
        (lambda: renamed("student.vit.", AVERAGED) | renamed("teacher.vit."), "teacher.vit", "student.vit"),
        (lambda: {"a": renamed("ema_model.", AVERAGED) | renamed("model.")}, "a.model", "a.ema_model"),
        (lambda: {"target_encoder": AVERAGED, "encoder": renamed("module.")}, "encoder", "target_encoder"),
    ],
)
def test_the_set_of_weights_that_was_read_is_named(tmp_path, content, label, unread):
    checkpoint = read_pretrained(save(tmp_path / "x.pth", content()))
    check_equal(checkpoint.state)
    assert f"{label} was read, not {unread}." in " ".join(checkpoint.notes)


def test_sets_of_weights_that_no_rule_puts_in_order_are_refused(tmp_path):
    path = save(tmp_path / "x.pth", renamed("left.") | renamed("right.", AVERAGED))
    with pytest.raises(ValueError, match=r"x\.pth holds 2 sets of weights, left and right, and nothing says which"):
        read_pretrained(path)
    path = save(tmp_path / "y.pth", PLAIN | renamed("module.", AVERAGED))
    with pytest.raises(ValueError, match=r"y\.pth holds cls_token twice, as cls_token and as module\.cls_token"):
        read_pretrained(path)


def test_what_a_prefix_leaves_out_is_named(tmp_path):
    state = renamed("model.backbone.", ENCODER) | {"model.head.weight": torch.ones(5, 24), "loss.centre": torch.ones(1)}
    checkpoint = read_pretrained(save(tmp_path / "x.pth", {"state_dict": state}))
    check_equal(checkpoint.state, ENCODER)
    assert checkpoint.head is None
    assert "Only names that begin with model.backbone. were read, not model.head.*, loss.*." in checkpoint.notes


def test_the_prefixes_of_mae_pytorch_and_hugging_face_stay(tmp_path):
    """Their names have `encoder.` and `vit.` themselves."""
    names = {"encoder.patch_embed.proj.weight", "encoder_to_decoder.weight", "decoder.head.weight"}
    weights, notes = weight_names.select({f"module.{n}": torch.ones(1) for n in names}, "x")
    assert weights is not None and weights.tensors.keys() == names and not notes
    names = {"encoder.patch_embed.proj.weight", "encoder.norm.weight"}  # the encoder of an unfinished file
    weights, notes = weight_names.select({"model": {n: torch.ones(1) for n in names}}, "x")
    assert weights is not None and weights.tensors.keys() == names and not notes
    names = {"vit.embeddings.patch_embeddings.projection.weight", "vit.encoder.layer.0.x.weight", "classifier.weight"}
    weights, notes = weight_names.select({"state_dict": {f"model.{n}": torch.ones(1) for n in names}}, "x")
    assert weights is not None and weights.tensors.keys() == names and not notes
