"""F's blocks inside of its float network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import Runner
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import nn

from mmauxq import compat
from mmauxq.deploy.slim import slim_checkpoint
from mmauxq.errors import UsageError
from tests.networks import batch, captured, classifier, joint_qat
from tests.running import make_runner

BWR = dict(type='mmauxq.BlockReplacement')
KD = dict(type='mmauxq.KnowledgeDistillation')
STAGES = [f'backbone.layer{i}.0' for i in (1, 2, 3)]
