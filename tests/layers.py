"""One random layer and the moments of its inputs."""

from __future__ import annotations

import torch

from sparsight import Pattern
from sparsight.calibration.gradients import Gradient
from sparsight.calibration.moments import Moments

PATTERNS = [Pattern.row(0.5), Pattern.row(0.7), Pattern.tensor(0.6), Pattern.nm(2, 4), Pattern.nm(4, 8)]


def case(dtype=torch.float32, dead=False, rows=12, columns=32, tokens=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g).to(dtype)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    size = torch.rand(columns, generator=g) * 2 + 0.2
    X = ((torch.randn(tokens, columns, generator=g) @ mix + 0.2) * size).to(dtype)
    if dead:
        X[:, ::3] = 0
    return W, X, moments_of(W, X)


def moments_of(W, X, sequences=5):
    moments = Moments(X.shape[1], W.device, with_gram=True)
    moments.add(X, 8, sequences=sequences)
    g = torch.Generator().manual_seed(9)
    slope = torch.randn(W.shape, generator=g)
    moments.sensitivity = Gradient(mean=slope, square=slope.square() + 0.1)
    return moments
