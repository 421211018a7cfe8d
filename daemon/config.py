"""The configuration: one TOML file plus environment overrides, validated as a whole.

Owns every setting, its default and its bounds. Environment variables are `REELD_` plus the path of the field
with `__` between its parts (`REELD_BROKER__URL`); `REELD_AMQP_URL` is short for `REELD_BROKER__URL`. The
environment is read here, once, and so is what lies in systemd's $CREDENTIALS_DIRECTORY. Leaves out the job's own
fields (`daemon.job`) and the model profiles (`parallel.profile`).
"""

import os
import socket
import tomllib
import urllib.parse
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from daemon.errors import ConfigError
from parallel.split import PinnedDegrees

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BrokerConfig(Section):
    """Where the broker is and how patient to be with it."""

    url: str = Field("amqp://guest:guest@127.0.0.1:5672/%2F", description="amqp:// or amqps:// URL", repr=False)
    url_file: Path | None = Field(None, description="file that holds the URL; wins over `url` (LoadCredential)")
    ca_file: Path | None = Field(None, description="who may have signed the broker's certificate, for amqps://")
    cert_file: Path | None = Field(None, description="our certificate, for a broker that asks for one")
    key_file: Path | None = Field(None, description="its private key, where cert_file does not hold it as well")
    prefix: Name = Field("reeld", description="prefix of every exchange and queue")
    heartbeat_seconds: int = Field(30, ge=5, le=600)
    connect_timeout_seconds: float = Field(10, gt=0, le=120)
    confirm_timeout_seconds: float = Field(30, gt=0, le=600)
    backoff_initial_seconds: float = Field(0.5, gt=0, le=60)
    backoff_max_seconds: float = Field(30, gt=0, le=600)
    prefetch_count: int = Field(
        1,
        ge=1,
        le=2,
        description="2: the next job is denoised while the last one is encoded, but a job may wait unacked behind "
        "another, so the broker's consumer_timeout must exceed twice limits.time_limit_seconds",
    )

    @field_validator("url")
    @classmethod
    def _is_amqp(cls, value: str) -> str:
        if not value.startswith(("amqp://", "amqps://")):
            raise ValueError("must start with amqp:// or amqps://")
        if not urllib.parse.urlsplit(value).hostname:
            raise ValueError("names no host")
        _ = urllib.parse.urlsplit(value).port  # raises ValueError when it is no port
        return value

    def resolved_url(self) -> str:
        """The URL to connect to. Raises ConfigError when `url_file` cannot be read."""
        if self.url_file is None:
            return self.url
        try:
            url = self.url_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"broker.url_file {self.url_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"broker.url_file {self.url_file}: is not text") from error
        if not url.startswith(("amqp://", "amqps://")):
            raise ConfigError(f"broker.url_file {self.url_file}: holds no amqp:// or amqps:// URL")
        return url


class TopologyConfig(Section):
    apply: bool = Field(False, description="`reeld run` declares the topology itself")
    patience_seconds: float = Field(
        60, ge=0, description="how long a topology that broke while serving may stay so before the daemon exits 78"
    )
    delivery_limit: int = Field(3, ge=1, le=100)
    retry_delays_seconds: tuple[Annotated[int, Field(ge=1, le=86400)], ...] = (10, 60, 300)
    max_length: int | None = Field(None, ge=1, description="most jobs that may wait; more are refused")
    unrouted_max_length: int = Field(10_000, ge=1)

    @field_validator("retry_delays_seconds")
    @classmethod
    def _is_rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must rise")
        return value


class ModelConfig(Section):
    profile: str = Field(description="name of a shipped profile, or the path of a TOML file")
    path: Path = Field(description="folder with the model's files")
    checksums: bool = Field(False, description="check the files against SHA256SUMS in the folder; reads them once more")


class LoraConfig(Section):
    """LoRAs that jobs may name. A directory offers every .safetensors file in it, as `name/file` without the ending."""

    name: Name
    path: Path = Field(description="a .safetensors file, or a directory of such")
    target: Literal["both", "high_noise", "low_noise"] = Field("both", description="what a job's `target` defaults to")


class InputsConfig(Section):
    schemes: tuple[Literal["file", "https", "http", "data"], ...] = ("https", "data")
    roots: tuple[Path, ...] = Field((), description="folders that file: URIs may point into")
    allow_private_addresses: bool = False
    max_bytes: int = Field(32 * 1024 * 1024, ge=1)
    max_pixels: int = Field(50_000_000, ge=1)
    max_video_bytes: int = Field(256 * 1024 * 1024, ge=1)
    max_video_pixels: int = Field(4096 * 2304, ge=1, description="pixels of one frame of a video")
    max_audio_bytes: int = Field(64 * 1024 * 1024, ge=1)
    max_audio_seconds: float = Field(60, gt=0)
    timeout_seconds: float = Field(60, gt=0, description="for fetching one input")
    decode_seconds: float = Field(120, gt=0, description="for decoding one video or sound")


class OutputConfig(Section):
    directory: Path = Path("/var/lib/reeld/output")
    crf: int = Field(18, ge=0, le=51, description="x264's constant rate factor; 0 is lossless")


class LimitsConfig(Section):
    max_body_bytes: int = Field(1024 * 1024, ge=1024)
    max_prompt_characters: int = Field(4000, ge=1)
    max_pixels_per_frame: int = Field(1280 * 1280, ge=256)
    max_num_frames: int = Field(241, ge=1)
    max_num_inference_steps: int = Field(200, ge=1)
    time_limit_seconds: float = Field(1700, gt=0, description="default and ceiling of a job's own time limit")
    generate_attempts: int = Field(2, ge=1, le=10)
    io_attempts: int = Field(4, ge=1, le=20)
    drain_seconds: float = Field(1800, ge=0)
    outcome_grace_seconds: float = Field(
        20, gt=0, description="how long ranks may go on without one that failed, before the group is ended"
    )
    cancel_memory_seconds: float = Field(
        86_400, gt=0, description="how long a cancelled job that was not met yet is remembered"
    )


class StallConfig(Section):
    """How long a phase may go without progress before its group is ended and started again.

    `*_seconds` of a phase is the ceiling, and the limit until the phase was seen once at this shape. After that the
    limit is `multiple` times the longest time seen, at least `floor_seconds`.
    """

    floor_seconds: float = Field(60, gt=0)
    multiple: float = Field(10, ge=2)
    silence_seconds: float = Field(180, gt=0, description="a process that says nothing at all")
    join_seconds: float = Field(600, gt=0, description="from the start of the processes until all ranks are joined")
    load_seconds: float = Field(1800, gt=0, description="one model")
    stage_seconds: float = Field(600, gt=0, description="one input")
    encode_seconds: float = Field(600, gt=0, description="text and image encoders")
    denoise_seconds: float = Field(900, gt=0, description="one step")
    decode_seconds: float = Field(900, gt=0)
    finish_seconds: float = Field(600, gt=0, description="encoding one frame, storing the file")
    leave_seconds: float = Field(60, gt=0, description="after the last job, until all ranks have left")

    def ceiling(self, phase: str) -> float:
        """The ceiling of a phase; one without a setting of its own has that of a step."""
        ceiling: float = getattr(self, f"{phase}_seconds", self.denoise_seconds)
        return ceiling


class ParallelConfig(Section):
    """How a job is spread over the ranks; what is left out is chosen for each job by a cost model."""

    cfg_degree: Literal[1, 2] | None = None
    ulysses_degree: int | None = Field(None, ge=1, le=64)
    ring_degree: int | None = Field(None, ge=1, le=64)
    vae: Literal["whole", "tiled"] = Field("whole", description="tiled: less memory, three times the work")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile of the blocks; auto: on GPUs")
    warm_up: (
        Literal["auto"] | tuple[Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}x[1-9]\d{0,4}$")], ...]
    ) = Field(
        "auto",
        description="shapes like 480x832x81 to run a step at before the first job; auto: the model's, if compiled",
    )

    def pinned(self) -> PinnedDegrees:
        return PinnedDegrees(
            cfg_degree=self.cfg_degree, ulysses_degree=self.ulysses_degree, ring_degree=self.ring_degree
        )


class LogConfig(Section):
    format: Literal["auto", "json", "console"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    directory: Path | None = Field(None, description="also write rank-N.jsonl files there; logrotate may move them")


class MetricsConfig(Section):
    """Where the launcher answers `/metrics`, `/livez` and `/readyz`. There is no password: keep it on loopback."""

    listen: str = Field("off", description="host:port, like 127.0.0.1:9464; port 0: any that is free; or off")

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value != "off":
            parts = urllib.parse.urlsplit(f"//{value}")
            if not parts.hostname or parts.port is None or parts.netloc != value or "@" in value:
                raise ValueError("must be host:port, or off")
        return value

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port, or None when it is off."""
        if self.listen == "off":
            return None
        parts = urllib.parse.urlsplit(f"//{self.listen}")
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port


def _worker_id() -> str:
    """The host's name, and the unit's instance where there is one: a box may run several."""
    parts = (socket.gethostname().replace("_", "-") or "worker", os.environ.get("REELD_INSTANCE"))
    return "-".join(filter(None, parts))


class Config(BaseSettings):
    """Everything `reeld run` needs to know. Frozen; built once by `load_config`."""

    model_config = SettingsConfigDict(
        env_prefix="REELD_", env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    pool: Name | None = Field(None, description="what this daemon makes; by default the first model's profile")
    worker_id: Name = Field(default_factory=_worker_id)
    nproc_per_node: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"
    rank_start_method: Literal["forkserver", "spawn"] = Field(
        "forkserver",
        description="forkserver: ranks are forked from one process that imported all; spawn: each imports",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: the GPUs that torch finds, or else the CPU; cuda refuses to start without a GPU",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    memory: Literal["resident", "encoder_offload", "fsdp", "vram_limit"] = Field(
        "resident", description="where the weights are; docs/memory.md says what each costs"
    )
    vram_limit_gib: float | None = Field(None, gt=0, description="with memory = vram_limit: how full the GPU may be")
    memory_limit_gib: float | None = Field(
        None, gt=0, description="a job that would need more on a rank is refused; by default what the GPU has"
    )
    heartbeat_seconds: float = Field(5, gt=0, le=60)
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


# What systemd's LoadCredential= puts into $CREDENTIALS_DIRECTORY, and the setting that it stands in for.
_CREDENTIALS = {
    "broker-url": "url_file",
    "broker-ca": "ca_file",
    "broker-cert": "cert_file",
    "broker-key": "key_file",
}


def _pick_up_credentials(values: dict[str, Any]) -> None:
    """Credentials that the service manager hands over; a path that the file names itself wins."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    broker = values.setdefault("broker", {})
    if directory and isinstance(broker, dict):
        for name, field in _CREDENTIALS.items():
            path = Path(directory) / name
            try:
                handed_over = path.is_file()
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from error
            if handed_over:
                broker.setdefault(field, str(path))


def load_config(path: Path | None) -> Config:
    """Reads and validates the whole configuration.

    Raises ConfigError with every fault, one a line, each with the path of its field.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; give the path of reeld's TOML file with --config") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    short = os.environ.get("REELD_AMQP_URL")
    if short and not os.environ.get("REELD_BROKER__URL"):
        broker = values.setdefault("broker", {})
        if isinstance(broker, dict):
            broker["url"] = short
    _pick_up_credentials(values)
    try:
        return Config(**values)
    except SettingsError as error:  # a variable for a whole section or list that is not JSON
        raise ConfigError(f"environment: {error}") from error
    except pydantic.ValidationError as error:
        where = path or "environment"
        faults = "\n".join(
            f"{where}: {'.'.join(str(part) for part in fault['loc']) or '(whole)'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False)
        )
        raise ConfigError(faults) from error
