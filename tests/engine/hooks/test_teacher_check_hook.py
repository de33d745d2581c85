from types import SimpleNamespace

import pytest
import torch
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from mmpretrain.structures import DataSample

from mmauxq.engine.hooks import TeacherCheckHook
from mmauxq.errors import UsageError
from tests.networks import AUX, captured, classifier, joint_qat

KD = dict(type='mmauxq.KnowledgeDistillation')


def batches(network, right, count=40, size=8):
    """Images of noise, of which ``right`` have the label that is predicted."""
    images = torch.randn(count, 1, size, size)
    found = network.eval()(images, mode='tensor').argmax(1)
    wrong = torch.arange(count) >= right
    labels = (found + wrong) % 10
    return [
        dict(
            inputs=list(images[i : i + 10]),
            data_samples=[
                DataSample().set_gt_label(int(n)) for n in labels[i : i + 10]
            ],
        )
        for i in range(0, count, 10)
    ]


@pytest.fixture
def network():
    torch.manual_seed(3)
    return MMPRETRAIN_MODELS.build(classifier())


def run(model, loader, **settings):
    loop = None if loader is None else SimpleNamespace(dataloader=loader)
    runner = SimpleNamespace(model=model, val_loop=loop)
    with captured() as messages:
        TeacherCheckHook(**settings).before_train(runner)
    return messages


def taught(network, tmp_path, **settings):
    file = tmp_path / 'teacher.pth'
    torch.save(network.state_dict(), file)
    return joint_qat(guidance=dict(KD, checkpoint=str(file), **settings))


def test_the_accuracy_is_printed(network, tmp_path):
    model = taught(network, tmp_path)
    messages = run(model, batches(network, 25))
    assert any(
        'has top-1 62.50 on 40 validation images' in m for m in messages
    )


def test_only_some_batches(network, tmp_path):
    model = taught(network, tmp_path)
    messages = run(model, batches(network, 25), batches=1)
    assert any('top-1 100.00 on 10 validation' in m for m in messages)


@pytest.mark.parametrize(
    'right, least, refused',
    [(7, None, True), (8, None, False), (7, 15.0, False), (25, 70.0, True)],
)
def test_a_teacher_that_guesses_is_refused(
    network, tmp_path, right, least, refused
):
    """By default below 19%: of 10 classes, 10% + 90% / 10."""
    model = taught(network, tmp_path, least_accuracy=least)
    loader = batches(network, right)
    if not refused:
        run(model, loader)
        return
    with pytest.raises(UsageError, match='expected top-1 of at least .*, got'):
        run(model, loader)


def test_f_itself_is_the_teacher_before_it_is_checked(network):
    model = joint_qat(guidance=[AUX, KD])
    model.architecture.load_state_dict(network.state_dict(), strict=False)
    messages = run(model, batches(network, 40))
    assert any('top-1 100.00 on 40' in m for m in messages)


def test_images_of_another_size_are_refused(tmp_path):
    config = classifier()
    network = MMPRETRAIN_MODELS.build(config)
    file = tmp_path / 'teacher.pth'
    torch.save(network.state_dict(), file)
    model = joint_qat(
        guidance=dict(
            KD,
            teacher=dict(model=config, input_shape=(1, 8, 8)),
            checkpoint=str(file),
        )
    )
    with pytest.raises(UsageError, match='images of 12 pixels, got one for 8'):
        run(model, batches(network, 40, size=12))


def test_nothing_random_is_drawn(network, tmp_path):
    model = taught(network, tmp_path)
    loader = batches(network, 40)
    dataset = [dict(inputs=b['inputs'][0], data_samples=b['data_samples'][0])
               for b in loader]  # fmt: skip
    drawing = torch.utils.data.DataLoader(
        dataset,
        collate_fn=lambda items: dict(
            inputs=[i['inputs'] for i in items],
            data_samples=[i['data_samples'] for i in items],
        ),
    )
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run(model, drawing)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    'model, loader, said',
    [
        (lambda: joint_qat(), [], 0),
        (lambda: joint_qat(guidance=KD), None, 1),
        (lambda: MMPRETRAIN_MODELS.build(classifier()), [], 0),
    ],
)
def test_when_there_is_nothing_to_check(model, loader, said):
    messages = run(model(), loader)
    assert sum('teacher,' in m for m in messages) == said
    if said:
        assert 'not checked, no validation data' in messages[-1]
