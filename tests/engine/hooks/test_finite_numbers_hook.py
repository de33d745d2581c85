import pytest
import torch
from mmengine.hooks import Hook

from mmauxq import compat
from mmauxq.engine.hooks import FiniteNumbersHook
from mmauxq.engine.hooks.finite_numbers_hook import SKIPPED
from mmauxq.errors import TrainingError, UsageError
from tests.networks import joint_qat
from tests.running import Samples, make_runner, state


def runner_with(tmp_path, dataset=None, model=None, fused=False, **hook):
    kind = dict(type='mmauxq.FiniteNumbersHook', **hook)
    optimizer = dict(type='SGD', lr=0.01, momentum=0.9, fused=fused)
    hooks = dict(
        checkpoint=dict(type='mmauxq.SafeCheckpointHook', interval=1),
        logger=dict(type='LoggerHook', interval=4),
    )
    return make_runner(
        tmp_path,
        dataset,
        model,
        custom_hooks=[kind],
        default_hooks=hooks,
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
        optim_wrapper=dict(optimizer=optimizer),
    )


# one that is fused looks itself, and is asked after its step
both = pytest.mark.parametrize('fused', [False, True])


class Spoiled(Samples):
    """One sample holds a number that is none."""

    def __init__(self, index: int, value: float) -> None:
        super().__init__()
        self.images[index, 0, 3, 3] = value


def parameters(model) -> dict[str, torch.Tensor]:
    """Copies of them."""
    return {k: v.detach().clone() for k, v in model.named_parameters()}


def spoil(model, name: str, step: int, how: str) -> None:
    """From a step on, a layer of ``model`` gives NaN, or its gradient is."""
    calls = []

    def hook(module, args, output):
        if torch.is_grad_enabled():  # neither calibration nor validation
            calls.append(1)
        if len(calls) <= step:
            return output
        if how == 'output':
            return output * float('nan')
        if output.requires_grad:
            output.register_hook(lambda grad: grad * float('inf'))
        return output

    model.get_submodule(name).register_forward_hook(hook)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_input(tmp_path, value):
    runner = runner_with(tmp_path, Spoiled(9, value))
    with pytest.raises(TrainingError) as caught:
        runner.train()
    text = str(caught.value)
    # 4 images in a step
    assert 'step 3: ' in text and 'the input, sample 1 of the batch' in text
    assert 'saved since training began' in text
    assert not list(tmp_path.glob('*.pth'))


@both
def test_output_of_a_layer_and_what_was_saved_before(tmp_path, fused):
    model = joint_qat()
    spoil(model, 'architecture.backbone.layer2.0.conv2', 5, 'output')
    runner = runner_with(tmp_path, model=model, fused=fused)
    with pytest.raises(TrainingError) as caught:
        runner.train()
    text = str(caught.value)
    assert 'step 6: ' in text
    assert (
        'the output of architecture.backbone.layer2.0.conv2' in (text)
        or 'layer2.0.bn2' in text
    )
    assert 'epoch_1.pth' in text
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    assert all(v.isfinite().all() for v in saved['state_dict'].values())
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    # nor was the step made in memory
    assert all(p.isfinite().all() for p in model.parameters())


@both
def test_gradient(tmp_path, fused):
    model = joint_qat()
    before = {}
    spoil(model, 'architecture.backbone.layer3.0.conv1', 2, 'gradient')
    runner = runner_with(tmp_path, model=model, fused=fused)

    class Watch(Hook):
        def before_train_iter(self, runner, **kwargs):
            before.update(parameters(model))

    runner.register_hook(Watch())
    with pytest.raises(TrainingError) as caught:
        runner.train()
    text = str(caught.value)
    assert 'step 3: ' in text and 'the gradient of ' in text
    assert 'backbone.layer3.0.conv1' in text
    for name, value in parameters(model).items():  # the step was not made
        assert torch.equal(value, before[name]), name


def test_a_fused_step_is_looked_at_during_the_next(tmp_path, monkeypatch):
    """And before anything is saved; outputs stay what the model gave. The
    message hub fetches losses where the log is written."""
    compat.read_losses_when_asked()
    monkeypatch.setattr(compat, '_is_on_gpu', torch.is_tensor)
    runner = runner_with(tmp_path, fused=True)
    waiting, losses, kept = [], [], []

    class Watch(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, outputs=None, **kwargs):
            waiting.append([step.number for step in hook._unread])
            losses.append(outputs['loss'].item())
            kept.append(len(runner.message_hub._kept.get('train/loss', ())))

        def before_save_checkpoint(self, runner, checkpoint):
            waiting.append('saved' if not hook._unread else 'unread')

    runner.register_hook(Watch())
    (hook,) = [h for h in runner.hooks if isinstance(h, FiniteNumbersHook)]
    runner.train()
    # the first step of an optimizer is looked at before it is made
    epoch = [[], [2], [3], [4], 'saved'], [[5], [6], [7], [8], 'saved']
    assert waiting == [*epoch[0], *epoch[1]]
    assert kept == [1, 2, 3, 0] * 2  # the log is written once in an epoch
    logged = runner.message_hub.get_scalar('train/loss').data[0]
    assert logged == pytest.approx(losses)
    assert len({*losses}) == 8


def test_loss_alone(tmp_path):
    model = joint_qat()
    losses = model.guidance.losses

    def spoiled(*args):
        # a constant: its gradient is 0
        return {k: v + float('inf') for k, v in losses(*args).items()}

    model.guidance.losses = spoiled
    with pytest.raises(TrainingError, match='step 1: .* in guidance.loss_aux'):
        runner_with(tmp_path, model=model).train()


def test_parameter(tmp_path):
    model = joint_qat(guidance=None)
    with torch.no_grad():
        model.architecture.head.fc.weight[0, 0] = float('nan')
    with pytest.raises(TrainingError, match='parameter .*head.fc.weight'):
        runner_with(tmp_path, model=model).train()


@both
def test_skip_leaves_everything_as_it_was(tmp_path, fused):
    """A step on a bad batch changes nothing but the count."""
    dataset = Spoiled(9, float('nan'))
    model = joint_qat()
    runner = runner_with(tmp_path, dataset, model, fused, on_bad='skip')
    seen = {}

    class Watch:
        priority = 95

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

        def after_train_iter(self, runner, **kwargs):
            seen[runner.iter] = state(model)
            seen[f'momentum {runner.iter}'] = [
                s['momentum_buffer'].clone()
                for s in runner.optim_wrapper.optimizer.state.values()
            ]

    runner._hooks.append(Watch())
    runner.train()
    for key in seen[1]:
        assert torch.equal(seen[2][key], seen[1][key]), key
    for a, b in zip(seen['momentum 1'], seen['momentum 2'], strict=True):
        assert torch.equal(a, b)
    key = 'architecture.head.fc.weight'
    assert not torch.equal(seen[3][key], seen[2][key])
    assert runner.message_hub.get_info(SKIPPED) == 2  # one in each epoch
    assert all(v.isfinite().all() for v in state(model).values())


@both
def test_a_first_step_that_is_left_out_has_no_momentum(tmp_path, fused):
    """torch's fused SGD would go on with memory that nobody wrote."""
    model = joint_qat()
    calls, states = [], []

    def once(module, args, output):
        if output.requires_grad and not calls:
            calls.append(1)
            output.register_hook(lambda grad: grad * float('nan'))

    model.get_submodule('architecture.head.fc').register_forward_hook(once)
    runner = runner_with(tmp_path, model=model, fused=fused, on_bad='skip')

    class Watch(Hook):
        def after_train_iter(self, runner, **kwargs):
            states.append(len(runner.optim_wrapper.optimizer.state))

    runner.register_hook(Watch())
    runner.train()
    assert runner.message_hub.get_info(SKIPPED) == 1
    assert states[0] == 0 and states[1] > 0


def test_skipping_ends(tmp_path):
    dataset = Samples()
    dataset.images[4:] = float('nan')
    runner = runner_with(tmp_path, dataset, on_bad='skip', most=2)
    with pytest.raises(TrainingError, match='step 4: .*and in the 2 steps'):
        runner.train()


def test_a_first_batch_without_numbers_calibrates_nothing(tmp_path):
    runner = runner_with(tmp_path, Spoiled(0, float('nan')), on_bad='skip')
    with pytest.raises(TrainingError, match='expected finite values to calib'):
        runner.train()


@pytest.mark.parametrize(
    'arguments', [dict(on_bad='ignore'), dict(most=0), dict(most=True)]
)
def test_arguments(arguments):
    with pytest.raises(UsageError, match='expected .*, got'):
        FiniteNumbersHook(**arguments)


@pytest.mark.parametrize('fused', [False, True])
def test_a_loss_scaler_looks_for_its_scale(tmp_path, fused):
    """A fused optimizer is called in the steps that it leaves out, too."""
    optimizer = dict(type='SGD', lr=0.01, momentum=0.9, fused=fused)
    runner = make_runner(
        tmp_path,
        custom_hooks=[dict(type='mmauxq.FiniteNumbersHook')],
        optim_wrapper=dict(
            type='mmauxq.CPUAmpOptimWrapper',
            dtype='float16',
            loss_scale=dict(init_scale=2.0**60),
            optimizer=optimizer,
        ),
    )
    before = state(runner.model)
    runner.train()
    scaler = runner.optim_wrapper.loss_scaler
    assert scaler.get_scale() == 2.0**56  # left out all four
    key = 'architecture.head.fc.weight'
    assert torch.equal(state(runner.model)[key], before[key])
    assert not runner.optim_wrapper.optimizer.state  # none was made


def test_gradients_of_overflowing_norm_are_no_fault(tmp_path):
    hook = FiniteNumbersHook()
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.full((2,), 1e30)
    optimizer = torch.optim.SGD([weight], 0.1)
    optimizer.register_step_pre_hook(hook._before_step)
    optimizer.step()
    assert weight.tolist() == pytest.approx([-1e29, -1e29])


def test_a_fused_optimizer_with_the_state_of_another(tmp_path):
    """The form of the step is that of this run, not of the file."""
    first, second = tmp_path / 'first', tmp_path / 'second'
    runner_with(first).train()
    runner = runner_with(second, fused=True)
    runner.load_or_resume = lambda: runner.resume(str(first / 'epoch_1.pth'))
    runner.train()
    assert runner.optim_wrapper.optimizer.param_groups[0]['fused']
    assert runner.iter == 8


on_gpu = pytest.param(
    'cuda',
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason='needs a CUDA GPU'
        ),
    ],
)


# said once in a process, where the mode is set
@pytest.mark.filterwarnings('ignore:Synchronization debug mode')
@pytest.mark.parametrize('device', ['cpu', on_gpu])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_leaves_out_a_step(device, kind, value):
    """Wherever the number is, and without a question to the GPU."""
    settings = dict(momentum=0.9) if kind is torch.optim.SGD else {}
    sizes = [(3,), (70000,), (64, 64, 3, 3), (1,)]
    weights = [
        torch.nn.Parameter(torch.rand(size, device=device)) for size in sizes
    ]
    optimizer = kind(weights, 0.1, fused=True, **settings)
    hook = FiniteNumbersHook()
    optimizer.register_step_pre_hook(hook._before_step)
    optimizer.register_step_post_hook(hook._after_step)
    for step in range(9):
        before = [w.detach().clone() for w in weights]
        for weight in weights:
            weight.grad = torch.rand_like(weight)
        place = weights[step % 4].grad.view(-1)
        bad = step in (3, 4, 5, 6)
        if bad:
            place[place.numel() * 2 // 3] = value
        if step and device == 'cuda':  # the host looks at the first
            torch.cuda.set_sync_debug_mode('error')
        optimizer.step()
        if device == 'cuda':
            torch.cuda.set_sync_debug_mode('default')
        flags = hook._found.values()
        assert [flag.item() for flag in flags] == [bad] * bool(step)
        assert not hasattr(optimizer, 'found_inf')
        for flag in flags:
            flag.zero_()
        for weight, was in zip(weights, before, strict=True):
            assert torch.equal(weight, was) == bad
