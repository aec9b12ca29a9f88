"""Test the look-up of Gluon's names, with every combination of old and new names that versions of Triton may have."""

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from lrnn.kernels.delta_rule.hopper import parts as gluon_parts

TILE = gl.shared_memory_descriptor
# the object that has the name, the old name, and the new name
RENAMED = [
    (gl, "thread_barrier", "barrier"),
    (tma, "async_copy_global_to_shared", "async_load"),
    (tma, "async_copy_shared_to_global", "async_store"),
    (TILE, "_reinterpret", "reinterpret"),
]


def import_again():
    spec = importlib.util.spec_from_file_location("gluon_parts_again", Path(gluon_parts.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_used(module) -> list[str]:
    """Return the names that the module chose. `fake` has replaced each function by its own name."""
    tile = SimpleNamespace(**{name: lambda *args, name=name: (name, args) for name in RENAMED[3][1:]})
    reinterpret, args = module.reinterpret.fn(tile, "dtype", "shape", "layout")
    assert args == ("dtype", "shape", "layout")
    return [module.part_barrier, module.tma_load, module.tma_store, reinterpret]


def fake(monkeypatch, owner, present, absent=None):
    monkeypatch.setattr(owner, present, present, raising=False)
    if absent is not None:
        monkeypatch.delattr(owner, absent, raising=False)


@pytest.mark.parametrize("new", list(itertools.product([False, True], repeat=len(RENAMED))))
def test_each_name_is_looked_up_by_itself(new, monkeypatch):
    expected = []
    for is_new, (owner, *names) in zip(new, RENAMED, strict=True):
        fake(monkeypatch, owner, names[is_new], absent=names[not is_new])
        expected.append(names[is_new])
    assert names_used(import_again()) == expected


def test_an_old_name_that_still_exists_is_not_used(monkeypatch):
    """Triton 3.9 has functions under the old names that raise an error."""
    for owner, old, new in RENAMED:
        fake(monkeypatch, owner, old)
        fake(monkeypatch, owner, new)
    assert names_used(import_again()) == [new for *_, new in RENAMED]


@pytest.mark.parametrize("aggregate", [gluon_parts.aggregate, gluon_parts._aggregate_before_38])
def test_a_class_takes_its_fields_by_position_or_by_name(aggregate):
    """This also holds in Triton before 3.8, which writes no constructor."""

    @aggregate
    class Pair:
        first: gl.constexpr
        second: gl.constexpr

    pair = Pair(1, second=None)
    assert (pair.first.value, pair.second.value) == (1, None)
    with pytest.raises((AssertionError, TypeError), match="third"):
        Pair(1, 2, third=3)
    with pytest.raises((KeyError, TypeError), match="second"):
        Pair(1)
