"""Weights of every kind that has broken a quantiser."""

import numpy as np
import torch


def inputs(columns=512, rows=16):
    """name -> float32 ``[rows, columns]``."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape)

    edges = np.zeros((24, columns))
    edges[1], edges[2], edges[3], edges[4], edges[5] = 1, -1, 1e-30, 1e4, -1e-20
    edges[6, ::2], edges[7, :256], edges[8], edges[9] = 1, 5, np.arange(columns), -np.arange(columns)
    edges[10], edges[11], edges[12], edges[13] = 1e-38, 1e-45, normal(columns) * 1e-40, normal(columns) * 1e-14
    edges[14], edges[15], edges[16] = 6e4, normal(columns) * 3e4, rng.integers(-3, 4, columns)
    edges[17], edges[18], edges[19] = rng.integers(0, 2, columns), np.sign(normal(columns)), 3.4e35
    edges[20], edges[21, 3], edges[22], edges[23] = normal(columns) * 1e30, 1, -0.0, normal(columns) * 1e-8
    kinds = {
        "normal": normal(rows, columns) * 0.02,
        "bf16": torch.from_numpy(normal(rows, columns) * 0.02).bfloat16().float().numpy(),
        "heavy tails": rng.standard_t(2, (rows, columns)) * 0.02,
        "rows of different size": normal(rows, columns) * np.exp(3 * normal(rows, 1)),
        "columns of different size": normal(rows, columns) * np.exp(3 * normal(1, columns)),
        "sparse": normal(rows, columns) * (rng.random((rows, columns)) < 0.05),
        "integers": rng.integers(-8, 8, (rows, columns)),
        "positive": rng.random((rows, columns)),
        "negative": -rng.random((rows, columns)),
        "outliers": normal(rows, columns) * np.where(rng.random((rows, columns)) < 1 / 64, 1e4, 1e-3),
        "huge": normal(rows, columns) * np.logspace(11, 17, rows)[:, None],
        "edges": edges,
    }
    return {name: values.astype(np.float32) for name, values in kinds.items()}


def column_importance(columns=512):
    """float32 ``[columns]``; some columns count for nothing."""
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal(columns) ** 2 * np.exp(rng.standard_normal(columns))).astype(np.float32)
    weights[rng.random(columns) < 0.1] = 0  # columns that nothing ever passed through
    return weights
