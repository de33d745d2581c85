"""Packages that only some commands need."""

import pytest

from mmauxq.errors import UsageError
from mmauxq.optional import INSTALL, need


@pytest.mark.parametrize('is_package', [False, True])
def test_a_folder_is_no_package(tmp_path, monkeypatch, is_package):
    """Commands look for modules where they are typed, and exports may lie
    there in a folder that is called ``onnx``."""
    folder = tmp_path / 'such_a_package'
    folder.mkdir()
    monkeypatch.setitem(INSTALL, folder.name, 'this')
    monkeypatch.syspath_prepend(tmp_path)
    if is_package:
        (folder / '__init__.py').touch()
        need(folder.name)
        return
    with pytest.raises(UsageError) as caught:
        need(folder.name)
    assert str(caught.value) == (
        'this needs the package such_a_package, which is not installed: '
        'pip install this'
    )
