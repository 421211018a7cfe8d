"""The configuration: one TOML file plus environment overrides, validated as a whole.

Owns the settings of the top level. Environment variables are `REELD_` plus the path of the field with `__` between its
parts (`REELD_BROKER__URL`). Leaves out the sections (`daemon.sections`), what wins where the environment and the file
differ (`daemon.environment`), the job's own fields (`daemon.job`) and the model profiles (`parallel.profile`).
"""

import os
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from daemon.environment import PREFIX, Environment
from daemon.errors import ConfigError
from daemon.sections import (
    BrokerConfig,
    InputsConfig,
    LimitsConfig,
    LogConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    Name,
    OutputConfig,
    ParallelConfig,
    StallConfig,
    TopologyConfig,
)


def _worker_id() -> str:
    """The host's name, and the unit's instance where there is one: a box may run several."""
    parts = (socket.gethostname().replace("_", "-") or "worker", os.environ.get("REELD_INSTANCE"))
    return "-".join(filter(None, parts))


class Config(BaseSettings):
    """Everything `reeld run` needs to know. Frozen; built once by `load_config`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
    )

    pool: Name | None = Field(None, description="what this daemon makes; by default the first model's profile")
    worker_id: Name = Field(
        default_factory=_worker_id,
        description="its own among all workers; by default the host's name, and the unit's instance",
    )
    nproc_per_node: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        "auto", description="ranks on this box; auto: one for each GPU, or one on the CPU"
    )
    rank_start_method: Literal["forkserver", "spawn"] = Field(
        "forkserver",
        description="forkserver: ranks are forked from one process that imported all; spawn: each imports",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: the GPUs that torch finds, or else the CPU; cuda refuses to start without a GPU",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="what is computed in")
    memory: Literal["resident", "encoder_offload", "fsdp", "vram_limit"] = Field(
        "resident", description="where the weights are; docs/memory.md says what each costs"
    )
    vram_limit_gib: float | None = Field(None, gt=0, description="with memory = vram_limit: how full the GPU may be")
    memory_limit_gib: float | None = Field(
        None, gt=0, description="a job that would need more on a rank is refused; by default what the GPU has"
    )
    heartbeat_seconds: float = Field(
        5, gt=0, le=60, description="between two events about the worker and all its ranks"
    )
    work_directory: Path = Field(Path("/var/lib/reeld/work"), description="staged inputs; shared between nodes")
    broker: BrokerConfig = BrokerConfig()
    topology: TopologyConfig = TopologyConfig()
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    loras: tuple[LoraConfig, ...] = ()
    lora_cache_bytes: int = Field(2 * 1024**3, ge=0, description="LoRAs each rank keeps in host memory, at most")
    inputs: InputsConfig = InputsConfig()
    output: OutputConfig = OutputConfig()
    parallel: ParallelConfig = ParallelConfig()
    limits: LimitsConfig = LimitsConfig()
    stall: StallConfig = StallConfig()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()

    @field_validator("loras")
    @classmethod
    def _has_unique_names(cls, value: tuple[LoraConfig, ...]) -> tuple[LoraConfig, ...]:
        names = [lora.name for lora in value]
        if len(set(names)) != len(names):
            raise ValueError(f"names {next(name for name in names if names.count(name) > 1)} twice")
        return value

    @model_validator(mode="after")
    def _hears_every_rank(self) -> Self:
        if self.stall.silence_seconds < 3 * self.heartbeat_seconds:
            raise ValueError("stall.silence_seconds must be at least 3 times heartbeat_seconds")
        return self

    @property
    def pool_name(self) -> str:
        """The pool: `pool`, or the first model's profile name (a path's stem)."""
        if self.pool:
            return self.pool
        profile = self.models[0].profile
        return Path(profile).stem if profile.endswith(".toml") else profile

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file's values come as init arguments; what the environment says wins over them.
        return env_settings, init_settings


def load_config(path: Path | None) -> Config:
    """Reads and validates the whole configuration.

    Raises ConfigError with every fault, one a line, each with the file or the variable and the path of its field.
    """
    values = {} if path is None else _read(path)
    environment = Environment(Config)
    environment.add_to(values)
    faults = list(environment.mistyped())
    try:
        config = Config(**values)
    except pydantic.ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            where = environment.source_of(fault["loc"]) or path or "environment"
            what = fault["msg"]
            if path is None and fault["type"] == "missing" and fault["loc"] == ("models",):
                what = "give reeld's TOML file with --config FILE or REELD_CONFIG"
            faults.append(f"{where}: {'.'.join(str(part) for part in fault['loc']) or '(whole)'}: {what}")
        raise ConfigError("\n".join(faults)) from error
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of reeld's TOML file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
