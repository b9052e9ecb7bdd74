"""Overrides are read and written in Hydra's own grammar."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mae.config import overrides

AWKWARD = st.text(st.sampled_from("ab/ =,:;'\"\\${}[]()?*~!#&|<>.-+@%^`\té水"), min_size=1)
NAMES = st.one_of(AWKWARD, st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1))


@given(NAMES.filter(lambda name: name != "???"))  # OmegaConf's word for a value that is missing
@example("runs/lr=1e-3,wd=0 it's")
@example("${oc.env:HOME}")
@example("\\${a}\\\\")
@example("null")
@example("1e-3")
@example("[a,b]")
@example("true")
def test_what_is_printed_to_be_pasted_comes_back_as_it_was(name):
    (argument,) = shlex.split(overrides.pasted("init", name))
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert override.key_or_group == "init" and not override.is_sweep_override()
    assert OmegaConf.to_container(OmegaConf.create([override.value()]), resolve=True) == [name]


@pytest.mark.parametrize(
    ("argument", "key", "values"),
    [
        ("init=runs/a", "init", ["runs/a"]),
        ("init='runs/lr=1,wd=0'", "init", ["runs/lr=1,wd=0"]),
        (r"init=runs/lr\=1", "init", ["runs/lr=1"]),
        ('+init="a b"', "init", ["a b"]),
        ("init='a,b',c", "init", ["a,b", "c"]),
        ("++init=choice(a,b)", "init", ["a", "b"]),
        ("~recipe", "recipe", [None]),
        ("task.k=[5,20]", "task.k", [[5, 20]]),
    ],
)
def test_keys_and_values_are_those_that_hydra_reads(argument, key, values):
    override = overrides.parsed(argument)
    assert override is not None and overrides.values_of(override) == values
    assert overrides.key_of(argument) == key and list(overrides.by_key(["-m", argument])) == [key]


def test_options_and_what_hydra_refuses_are_no_overrides():
    assert overrides.parsed("--cfg") is None and overrides.parsed("init=a=b") is None
    assert overrides.key_of("+init=a=b") == "init"
