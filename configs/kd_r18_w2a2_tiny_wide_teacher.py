# The best that docs/experiments.md has for ResNet-18 at 2 bits. Needs
# model.float_checkpoint and model.guidance.checkpoint, that of the teacher.
_base_ = './kd_r18_w2a2_tiny.py'

model = dict(
    guidance=dict(
        teacher='mmauxq::_base_/../float_r18_wide_tiny.py',
        logits=dict(tau=4.0),
    )
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
