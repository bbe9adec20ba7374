"""Distillation on small networks: the student comes nearer, and only what may learn does."""

import torch
from torch import nn

from modelgrove_kernels.calls import Call
from modelgrove_kernels.distillation import distil


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4))


def calls_of(teacher):
    inputs = [torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return [Call(0.0, (x,), {}, teacher(x).detach()) for x in inputs]


def lost(student, calls):
    return sum(float((student(*call.positional) - call.output).square().sum()) for call in calls)


def learn(student, teacher, calls, stages, steps=200):
    distil(student, teacher, stages, calls, steps, torch.Generator().manual_seed(0))


def test_the_student_comes_nearer_to_the_teacher_s_output_and_features():
    teacher, student = network(0).requires_grad_(False), network(0)
    with torch.no_grad():
        student[0].weight += 0.05 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    calls = calls_of(teacher)
    before = lost(student, calls)
    feature = float((student[0].weight - teacher[0].weight).detach().norm())
    learn(student, teacher, calls, {"0": ("0", 1.0)})
    assert lost(student, calls) < 0.7 * before
    assert float((student[0].weight - teacher[0].weight).detach().norm()) < feature


def test_what_is_frozen_stays():
    teacher, student = network(0).requires_grad_(False), network(3)
    student[0].requires_grad_(False)
    kept, moved = student[0].weight.clone(), student[2].weight.detach().clone()
    learn(student, teacher, calls_of(teacher), {}, steps=5)
    assert torch.equal(student[0].weight, kept)
    assert not torch.equal(student[2].weight, moved)


def test_nothing_that_learns_is_nothing_to_do():
    teacher = network(0).requires_grad_(False)
    student = network(1).requires_grad_(False)
    before = student[0].weight.clone()
    learn(student, teacher, calls_of(teacher), {})
    assert torch.equal(student[0].weight, before)
    assert not teacher[0]._forward_hooks
