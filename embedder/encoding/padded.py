"""Networks that pad: any encoder of transformers, and any in an ONNX file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretell.errors import FailedPreconditionError


class PaddedModel:
    """A model of `transformers.AutoModel`. Implements `backend.Network`."""

    pads = True

    def __init__(self, model: Any, dtype: torch.dtype, device: str) -> None:
        self._model = model.to(device)
        self._dtype = dtype
        self._device = device

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Hidden states, float32, shape (tokens, cols)."""
        grid, real = _grid(ids, lengths)
        attended = torch.from_numpy(real).to(self._device)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._dtype is torch.bfloat16):
            hidden: Tensor = self._model(
                input_ids=torch.from_numpy(grid).to(self._device), attention_mask=attended.long()
            ).last_hidden_state  # (texts, longest, cols)
        return hidden[attended].float()


class OnnxNetwork:
    """An encoder in an ONNX file, run by ONNX Runtime on the CPU. Implements `backend.Network`.

    Its inputs are those of BERT by their usual names; its first output is the hidden states.

    Raises:
        FailedPreconditionError: ONNX Runtime is not installed or cannot read the file.
    """

    pads = True

    def __init__(self, file: Path, threads: int) -> None:
        try:
            import onnxruntime  # of the extra `onnx`
        except ImportError as error:
            raise FailedPreconditionError(
                "runtime is onnxruntime, which is not installed: it comes with the extra `onnx`"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors share no class
            raise FailedPreconditionError(f"{file} cannot be loaded: {error}") from error
        self._inputs = {each.name for each in self._session.get_inputs()}

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Hidden states, float32, shape (tokens, cols)."""
        grid, real = _grid(ids, lengths)
        values = {
            "input_ids": grid,
            "attention_mask": real.astype(np.int64),
            "token_type_ids": np.zeros_like(grid),
        }
        given = {name: array for name, array in values.items() if name in self._inputs}
        hidden = self._session.run(None, given)[0]  # (texts, longest, cols)
        return torch.from_numpy(hidden[real])


class _Hidden(torch.nn.Module):
    """A model with the hidden states as its only output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def export_onnx(model: Any, file: Path) -> None:
    """Writes a model of `transformers.AutoModel`, loaded with eager attention, as ONNX.

    Of the exporters and kinds of attention this gives the graph that runs fastest: ONNX Runtime
    finds the whole attention in it.
    """
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    axes = {0: "texts", 1: "tokens"}
    with warnings.catch_warnings():
        # That this exporter is the older one, and what it makes of constant shapes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Hidden(model).eval(),
            (ids, torch.tensor([[1, 1, 1], [1, 1, 0]])),
            str(file),
            dynamo=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["hidden"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
        )


def _grid(
    ids: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids of packed tokens with padding, and where there is none; both (texts, longest)."""
    real = np.arange(int(lengths.max())) < lengths[:, None]
    grid = np.zeros(real.shape, np.int64)
    grid[real] = ids
    return grid, real
