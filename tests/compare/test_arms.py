import gc
import json

import pytest

from mmauxq.compare.arms import (
    EQUAL,
    budget,
    check_arms,
    read_arms,
    teachers,
)
from mmauxq.errors import UsageError
from tests.conftest import ROOT

QAT = ROOT / 'configs/qat_r20_w2a2_digits.py'
AUX = ROOT / 'configs/aux_r20_w2a2_digits.py'
KD = ROOT / 'configs/kd_r20_w2a2_digits.py'
DSN = ROOT / 'configs/dsn_r20_w2a2_digits.py'


def test_arms_are_configs_with_overrides():
    arms = read_arms(
        [
            f'plain={QAT}',
            f'narrow={AUX},model.guidance.width_ratio=0.25',
        ],
        {'model.policy.first': 8},
    )
    assert list(arms) == ['plain', 'narrow']
    assert arms['narrow'].model.guidance.width_ratio == 0.25
    assert all(arm.model.policy.first == 8 for arm in arms.values())


def test_overrides_may_be_lists():
    hooks = '[{"type": "SyncBuffersHook"}, {"type": "mmauxq.GuidanceWeightHook", "end_weight": 0.1}]'  # noqa: E501
    arms = read_arms(
        [
            f'a={AUX},custom_hooks={hooks},model.guidance.loss_weight=0.5',
            f'b={DSN},model.guidance.alphas=[1.0, 2.0],log_level=DEBUG',
        ]
    )
    assert arms['a'].custom_hooks[1]['end_weight'] == 0.1
    assert arms['a'].model.guidance.loss_weight == 0.5
    assert arms['b'].model.guidance.alphas == [1.0, 2.0]
    assert arms['b'].log_level == 'DEBUG'


@pytest.mark.parametrize(
    'arms, message',
    [
        (['plain'], r"expected NAME=CONFIG\[,KEY=VALUE\], got 'plain'"),
        ([f'a/b={QAT}'], 'expected a name of at most 64 letters.*got .a/b'),
        ([f'..={QAT}'], 'begins with no dot, got'),
        ([f'.a={QAT}'], 'begins with no dot, got'),
        ([f'{"a" * 65}={QAT}'], 'expected a name of at most 64 letters'),
        ([f'a\x1b[2J={QAT}'], r"got 'a\\x1b\[2J'"),
        ([f'ä={QAT}'], 'expected a name of'),
        ([f'a={QAT}', f'a={AUX}'], "arm 'a' is given twice"),
        (['a=nowhere.py'], 'config nowhere.py does not exist'),
        ([f'a={QAT},b'], "arm 'a': expected KEY=VALUE, got 'b'"),
        (
            [f'a={QAT}', f'b={AUX},optim_wrapper.optimizer.lr=1'],
            "arms 'a' and 'b' differ in optim_wrapper",
        ),
        (
            [f'a={QAT}', f'b={AUX},val_dataloader.dataset.split=train'],
            "arms 'a' and 'b' differ in val_dataloader",
        ),
        (
            [f'a={QAT}', f'b={AUX},train_cfg.max_epochs=99'],
            "arms 'a' and 'b' differ in train_cfg",
        ),
    ],
)
def test_unfair_or_unknown_arms_are_refused(arms, message):
    with pytest.raises(UsageError, match=message):
        read_arms(arms)


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
@pytest.mark.parametrize(
    'text, message',
    [
        (b'model = dict(', 'SyntaxError'),
        (b'\xff', '.'),
        (b'\x00', '.'),
        (b'x = undefined', 'NameError'),
        (b'raise SystemExit(0)', 'SystemExit'),
        (b'_base_ = "none.py"', 'none.py'),
        (b'x = 1', 'has no `model`'),
        (b'model = 3', 'has no `model`'),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / 'bad.py').write_bytes(text)
    with pytest.raises(UsageError, match=f"^arm 'b': .*{message}") as error:
        read_arms([f'a={QAT}', f'b={tmp_path / "bad.py"}'])
    assert '\n' not in str(error.value)
    del error
    gc.collect()  # MMEngine left a file open


def test_names_of_arms():
    names = ['w4a4', '_x', '-', '+1', '0.25', 'a' * 64]
    assert list(read_arms([f'{name}={QAT}' for name in names])) == names


def test_arms_may_differ_in_precision():
    bf16 = 'optim_wrapper.type=AmpOptimWrapper,optim_wrapper.dtype=bfloat16'
    arms = read_arms([f'a={QAT}', f'b={QAT},{bf16}'])
    assert arms['b'].optim_wrapper.dtype == 'bfloat16'
    assert budget({'b': arms['b']}) == budget({'a': arms['a']})
    with pytest.raises(UsageError, match='differ in optim_wrapper'):
        read_arms([f'a={QAT}', f'b={QAT},{bf16},optim_wrapper.accum=2'])


def test_arms_may_differ_in_what_is_tuned():
    key = 'optim_wrapper.optimizer.lr'
    words = [f'a={QAT}', f'b={AUX},{key}=0.003']
    with pytest.raises(UsageError, match='differ in optim_wrapper; .* --tune'):
        read_arms(words)
    arms = read_arms(words, None, key)
    assert arms['b'].optim_wrapper.optimizer.lr == 0.003
    of_a, of_b = (budget({name: arms[name]}, key) for name in arms)
    assert of_a == of_b
    assert 'lr' not in of_a['optim_wrapper']['optimizer']
    assert of_a['optim_wrapper']['optimizer']['momentum'] == 0.9
    words[1] += ',optim_wrapper.optimizer.momentum=0.8'
    with pytest.raises(UsageError, match='differ in optim_wrapper'):
        read_arms(words, None, key)


def test_teachers_with_a_checkpoint_of_their_own():
    both = ROOT / 'configs/auxkd_r20_w2a2_digits.py'
    arms = read_arms(
        [
            f'plain={QAT}',
            f'own={KD}',
            f'kd={KD},model.guidance.checkpoint=a.pth',
            f'both={both},model.guidance.1.checkpoint=b.pth,'
            'model.float_checkpoint=f.pth',
        ]
    )
    assert teachers(arms) == {
        "arm 'kd': model.guidance.checkpoint": 'a.pth',
        "arm 'both': model.guidance.1.checkpoint": 'b.pth',
    }


def test_the_budget_is_what_all_arms_have_in_common():
    found = budget(read_arms([f'plain={QAT}', f'aux={AUX}']))
    assert json.loads(json.dumps(found)) == found
    assert found['train_cfg']['max_epochs'] == 20
    assert found['val_dataloader']['dataset']['split'] == 'test'
    assert list(found) == list(EQUAL)


TEACHER = f'{KD},model.guidance.train_teacher=true,model.guidance.teacher'


@pytest.mark.parametrize(
    'arm, message',
    [
        (f'{AUX},model.guidance.taps=backbone.layer9.*', 'matches nothing'),
        (
            f'{DSN},model.guidance.alphas=[1, 1]',
            'expected 9 weights,.* got 2',
        ),
        (
            f'{TEACHER}={ROOT / "configs/float_r20_fmnist.py"}',
            'for images of 8 pixels, got one for 28',
        ),
        (
            f'{KD},model.guidance.checkpoint=none.pth',
            'none.pth does not exist',
        ),
        (f'{KD},model.guidance.logits.type=mmrazor.Nope', 'registered in'),
        (f'{AUX},model.guidance.width=2', 'did you mean width_ratio'),
        (f'{AUX},model.architecture.head.type=Nope', 'Nope'),
    ],
)
def test_an_arm_that_cannot_be_built_is_refused(arm, message):
    """Before any run begins; the arms before it are in order."""
    arms = [f'plain={QAT}', f'bad={arm}']
    with pytest.raises(UsageError, match=f"arm 'bad': .*{message}") as error:
        check_arms(read_arms(arms))
    assert '\n' not in str(error.value)


def test_a_teacher_with_other_classes_is_refused(tmp_path):
    other = tmp_path / 'other.py'
    other.write_text(
        f"_base_ = '{ROOT / 'configs/float_r20_digits.py'}'\n"
        'model = dict(head=dict(num_classes=7))\n'
    )
    arms = read_arms([f'bad={TEACHER}={other}'])
    with pytest.raises(UsageError, match='10 classes, those of F, got 7'):
        check_arms(arms)
