"""Triton's interpreter, in less time."""

import importlib.util

import pytest


@pytest.fixture(scope='session', autouse=True)
def the_language_is_searched_once():
    """Does not change what Triton's interpreter computes, only how often it
    looks for the functions of ``triton.language`` that it replaces.

    It does so whenever a kernel is launched or calls a function, which is a
    third of the time.
    """
    if importlib.util.find_spec('triton') is None:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    def builtins(place, names):
        members = ((name, getattr(place, name)) for name in names)
        return [(n, m) for n, m in members if tl.core.is_builtin(m)]

    places = tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base
    names = {p: [n for n, _ in builtins(p, dir(p))] for p in places}

    def replace(place, builder, scope):
        for name, member in builtins(place, names[place]):
            interpreter._patch_attr(place, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, '_patch_builtin', replace)
        yield
