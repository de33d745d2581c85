"""The config that a runner holds."""

import copy

from mmengine.config import Config

from mmauxq.engine.build_runner import RememberedText


def test_a_text_is_formatted_once_and_anew_after_a_change(monkeypatch):
    cfg = Config(dict(model=dict(type='X', sizes=[1, 2]), work_dir='here'))
    before = cfg.pretty_text
    formatted = []
    plain = Config.pretty_text.fget

    def counted(self):
        formatted.append(1)
        return plain(self)

    monkeypatch.setattr(Config, 'pretty_text', property(counted))
    held = copy.deepcopy(RememberedText.of(cfg))
    assert held.pretty_text == held.pretty_text == before
    assert len(formatted) == 1
    held.model.sizes.append(3)
    assert held.pretty_text == before.replace(' 2,\n', ' 2,\n        3,\n')
    held.merge_from_dict({'model.type': 'Y'})
    assert "type='Y'" in held.pretty_text
    assert len(formatted) == 3
    assert cfg.model.type == 'X' and cfg.pretty_text == before
