"""`collate`: samples that lack modalities, as a batch and who is present."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from drifa_attn.trees import map_tensors, parts, rebuilt


def collate(samples: Sequence[Any], modalities: Sequence[str] | None = None) -> tuple[Any, ...]:
    """A batch of samples whose absent modalities are None, and who is present: what a fused network and its loss take.

        loader = DataLoader(dataset, 32, collate_fn=drifa_attn.collate)   # dataset[i]: ({"skin": x, "record": None}, labels)
        for inputs, present, labels in loader:
            loss(net(inputs, present), labels)

    Args:
        samples: each `{modality: value or None}`, or a tuple that begins with one. A value is a tensor, an array, a number or a
            list of numbers, or a tuple or dict of such, with the same shapes in all samples. A modality that a sample leaves
            out is absent, as one that is None. What follows in the tuple is collated as a `DataLoader` does by itself.
        modalities: the order of the columns of `present`, that of the network's branches; None for that of the first sample.
            With a `DataLoader` it is given by `functools.partial(drifa_attn.collate, modalities=[...])`.

    Shape: a list of b samples -> `(inputs, present, *others)`: inputs {modality: values `b …`, zeros where a sample has none;
        None where none of them has it}, present `b m` (bool).
    Raises: ValueError: no sample, a modality that is not among the `modalities`, or values of unequal shapes or parts;
        TypeError: a sample that is no dict and begins with none, or a value that is no tensor.
    Differs: not in the paper, whose samples have every modality.
    """
    rows = [checked_sample(sample) for sample in samples]
    if not rows:
        raise ValueError("collate expected at least one sample, got none.")
    names = list(rows[0][0] if modalities is None else modalities)
    if odd := {name for inputs, *_ in rows for name in inputs if name not in names}:
        raise ValueError(
            f"collate expected samples of the modalities {names}, got {sorted(odd)} besides: name all of them in every sample, "
            "None for what it lacks, or give modalities=[...]."
        )
    columns = {name: [inputs.get(name) for inputs, *_ in rows] for name in names}
    present = torch.tensor([[value is not None for value in column] for column in columns.values()], dtype=torch.bool)
    inputs = {name: filled(name, column) for name, column in columns.items()}
    others = [default_collate(list(column)) for column in zip(*(row[1:] for row in rows), strict=True)]
    return inputs, present.T.reshape(len(rows), len(names)), *others


def checked_sample(sample: Any) -> tuple[Any, ...]:
    """A sample as a tuple whose first part is a dict; a `TypeError` if it is none."""
    row = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
    if not row or not isinstance(row[0], Mapping):
        raise TypeError(
            f"collate expected samples as {{modality: value or None}}, or as a tuple that begins with that, got {sample!r:.80}."
        )
    return row


def filled(name: str, values: Sequence[Any]) -> Any:
    """The values of a modality as a batch, zeros where they are None; None if all are."""
    rows = torch.tensor([i for i, value in enumerate(values) if value is not None], dtype=torch.long)
    if not len(rows):
        return None
    known = stacked(name, [value for value in values if value is not None])
    return map_tensors(known, lambda x: x.new_zeros(len(values), *x.shape[1:]).index_copy(0, rows.to(x.device), x))


def stacked(name: str, values: Sequence[Any]) -> Any:
    """Values of one structure as this structure of tensors `b …`."""
    first = values[0]
    if isinstance(first, tuple | Mapping):
        if any(type(value) is not type(first) or parts(value).keys() != parts(first).keys() for value in values):
            raise ValueError(f"collate expected {name!r} of all samples to have the same parts, got {values!r:.160}.")
        return rebuilt(first, {key: stacked(name, [parts(value)[key] for value in values]) for key in parts(first)})
    try:
        tensors = [value if isinstance(value, Tensor) else torch.as_tensor(value) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"collate expected {name!r} as tensors or numbers, got {first!r:.80}: {error}") from error
    if shapes := {tuple(x.shape) for x in tensors} - {tuple(tensors[0].shape)}:
        raise ValueError(
            f"collate expected {name!r} of one shape in all samples, got {tuple(tensors[0].shape)} and {min(shapes)}: resize, "
            "crop or pad them in the dataset."
        )
    return torch.stack(tensors)
