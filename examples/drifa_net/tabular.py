"""Records as vectors: numbers standardised, words one of their kinds, both as the training rows have them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from examples.drifa_net.table import as_numbers, as_words

Encoding = dict[str, dict[str, Any]]  # of each column, {"mean", "deviation", "missing"} or {"words"}; plain values


def fitted(frame: pd.DataFrame, name: str, rows: np.ndarray) -> Encoding:
    """How the columns of a table are encoded, from these rows, those of training."""
    found: Encoding = {}
    for column in frame.columns:
        numbers = as_numbers(frame[column])
        if numbers is None:
            words = as_words(frame[column]).iloc[rows].dropna()
            found[column] = {"words": sorted(words.unique())}
            continue
        known = numbers.iloc[rows].dropna()
        mean, deviation = (float(known.mean()), float(known.std(ddof=0))) if len(known) else (0.0, 1.0)
        found[column] = {"mean": mean, "deviation": deviation or 1.0, "missing": bool(numbers.isna().any())}
    if not width(found):
        raise ValueError(f"{name}: no column of the record has a value in training: name others by --record.")
    return found


def width(encoding: Mapping[str, Mapping[str, Any]]) -> int:
    """The length of the vector."""
    return sum(len(one["words"]) if "words" in one else 1 + one["missing"] for one in encoding.values())


def encoded(frame: pd.DataFrame, encoding: Mapping[str, Mapping[str, Any]], name: str) -> Tensor:
    """The rows of a table as `n c`: a number that is missing is the mean, and marked if any is; an unknown word is none."""
    columns = []
    for column, one in encoding.items():
        if column not in frame.columns:
            raise ValueError(f"{name} has no column {column!r}, which the run was trained with; it has {list(frame.columns)}.")
        if "words" in one:
            words = as_words(frame[column]).to_numpy()
            columns += [(words == word).astype(np.float32) for word in one["words"]]
            continue
        numbers = as_numbers(frame[column])
        if numbers is None and frame[column].notna().any():
            raise ValueError(f"{name}: column {column!r} has cells that are no numbers: the run was trained with numbers.")
        values = np.full(len(frame), np.nan) if numbers is None else numbers.to_numpy(float)
        columns.append(np.nan_to_num((values - one["mean"]) / one["deviation"]).astype(np.float32))
        columns += [np.isnan(values).astype(np.float32)] if one["missing"] else []
    return torch.from_numpy(np.stack(columns, 1))
