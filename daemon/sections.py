"""The configuration's sections: their settings, each with its default, bounds and meaning.

docs/configuration.md is rendered from them. Leaves out the top level, and how a file and the environment become one
(`daemon.config`).
"""

import urllib.parse
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from daemon.broker_url import check_broker_url
from daemon.errors import ConfigError
from parallel.split import PinnedDegrees

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Section(BaseModel):
    # A fault must not repeat what is wrong: it may be a password.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class BrokerConfig(Section):
    """Where the broker is and how patient to be with it."""

    url: str = Field("amqp://guest:guest@127.0.0.1:5672/%2F", description="amqp:// or amqps:// URL", repr=False)
    url_file: Path | None = Field(None, description="file that holds the URL; wins over `url` (LoadCredential)")
    ca_file: Path | None = Field(None, description="who may have signed the broker's certificate, for amqps://")
    cert_file: Path | None = Field(None, description="our certificate, for a broker that asks for one")
    key_file: Path | None = Field(None, description="its private key, where cert_file does not hold it as well")
    prefix: Name = Field("reeld", description="prefix of every exchange and queue")
    heartbeat_seconds: int = Field(
        30, ge=5, le=600, description="AMQP heartbeat: a broker that is silent for so long counts as gone"
    )
    connect_timeout_seconds: float = Field(10, gt=0, le=120, description="for one try to connect")
    confirm_timeout_seconds: float = Field(
        30, gt=0, le=600, description="for one confirm or channel; then the connection is opened anew"
    )
    backoff_initial_seconds: float = Field(
        0.5, gt=0, le=60, description="longest first pause between two tries to connect or publish"
    )
    backoff_max_seconds: float = Field(
        30, gt=0, le=600, description="longest pause between two tries, however long the broker is away"
    )
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
        check_broker_url(value)
        return value

    def resolved_url(self) -> str:
        """The URL to connect to. Raises ConfigError when `url_file` cannot be read or holds no URL of a broker."""
        url = self.unchecked_url()
        if self.url_file is not None:
            try:
                check_broker_url(url)
            except ValueError as error:
                raise ConfigError(f"broker.url_file: {self.url_file}: its URL {error}") from error
        return url

    def unchecked_url(self) -> str:
        """What is given for a URL, for who looks for secrets in it. Raises ConfigError when it cannot be read."""
        if self.url_file is None:
            return self.url
        try:
            return self.url_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"broker.url_file: {self.url_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"broker.url_file: {self.url_file}: is not text") from error


class TopologyConfig(Section):
    """What the broker holds for the pool: queues, their limits, and who declares them (docs/brokers.md)."""

    apply: bool = Field(False, description="`reeld run` declares the topology itself")
    patience_seconds: float = Field(
        60, ge=0, description="how long a topology that broke while serving may stay so before the daemon exits 78"
    )
    delivery_limit: int = Field(
        3, ge=1, le=100, description="so often lost with its worker, or handed back, a job is a dead letter"
    )
    retry_delays_seconds: tuple[Annotated[int, Field(ge=1, le=86400)], ...] = Field(
        (10, 60, 300), description="the retry ladder: how long a failed job waits in each of its queues, rising"
    )
    max_length: int | None = Field(None, ge=1, description="most jobs that may wait; more are refused")
    unrouted_max_length: int = Field(
        10_000, ge=1, description="events that nobody listened to and that are kept; older ones go"
    )

    @field_validator("retry_delays_seconds")
    @classmethod
    def _is_rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must rise")
        return value


class ModelConfig(Section):
    """The models of the pool. A job goes to the first that does its task with its inputs."""

    profile: str = Field(description="name of a shipped profile, or the path of a TOML file")
    path: Path = Field(description="folder with the model's files")
    checksums: bool = Field(False, description="check the files against SHA256SUMS in the folder; reads them once more")


class LoraConfig(Section):
    """LoRAs that jobs may name. A directory offers every .safetensors file in it, as `name/file` without the ending."""

    name: Name = Field(description="by which jobs ask for it")
    path: Path = Field(description="a .safetensors file, or a directory of such")
    target: Literal["both", "high_noise", "low_noise"] = Field("both", description="what a job's `target` defaults to")


class InputsConfig(Section):
    """What a job's images, videos and sounds may be, and where they may come from (docs/tasks.md)."""

    schemes: tuple[Literal["file", "https", "http", "data"], ...] = Field(
        ("https", "data"), description="of the URIs that inputs may have; file needs roots"
    )
    roots: tuple[Path, ...] = Field((), description="folders that file: URIs may point into")
    allow_private_addresses: bool = Field(
        False, description="whether inputs may come from addresses that are not public"
    )
    max_bytes: int = Field(32 * 1024 * 1024, ge=1, description="of one image")
    max_pixels: int = Field(50_000_000, ge=1, description="of one image")
    max_video_bytes: int = Field(256 * 1024 * 1024, ge=1, description="of one video")
    max_video_pixels: int = Field(4096 * 2304, ge=1, description="pixels of one frame of a video")
    max_audio_bytes: int = Field(64 * 1024 * 1024, ge=1, description="of one sound")
    max_audio_seconds: float = Field(60, gt=0, description="of one sound")
    timeout_seconds: float = Field(60, gt=0, description="for fetching one input")
    decode_seconds: float = Field(120, gt=0, description="for decoding one video or sound")


class OutputConfig(Section):
    """Where videos go, and how they are encoded."""

    directory: Path = Field(
        Path("/var/lib/reeld/output"),
        description="videos and manifests; shared by the workers of a pool, on a file system with hard links",
    )
    crf: int = Field(18, ge=0, le=51, description="x264's constant rate factor; 0 is lossless")


class LimitsConfig(Section):
    """What a job may ask for, how often something is tried, and how long is waited."""

    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="of a job's message")
    max_prompt_characters: int = Field(4000, ge=1, description="of a prompt, and of a negative one")
    max_pixels_per_frame: int = Field(1280 * 1280, ge=256, description="height times width that a job may ask for")
    max_num_frames: int = Field(241, ge=1, description="that a job may ask for")
    max_num_inference_steps: int = Field(200, ge=1, description="that a job may ask for")
    time_limit_seconds: float = Field(1700, gt=0, description="default and ceiling of a job's own time limit")
    generate_attempts: int = Field(2, ge=1, le=10, description="tries in place to generate, before the retry ladder")
    io_attempts: int = Field(4, ge=1, le=20, description="tries in place to fetch inputs, and to store the video")
    drain_seconds: float = Field(
        1800, ge=0, description="how long a drain lets the job in hand go on; then it is handed back"
    )
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

    floor_seconds: float = Field(60, gt=0, description="no learned limit is less")
    multiple: float = Field(10, ge=2, description="of the longest time seen, a learned limit")
    silence_seconds: float = Field(180, gt=0, description="a process that says nothing at all")
    join_seconds: float = Field(600, gt=0, description="from the start of the processes until all ranks are joined")
    load_seconds: float = Field(1800, gt=0, description="one model")
    stage_seconds: float = Field(600, gt=0, description="one input, and looking for the job's manifest or LoRAs")
    encode_seconds: float = Field(600, gt=0, description="text and image encoders")
    denoise_seconds: float = Field(900, gt=0, description="one step")
    decode_seconds: float = Field(900, gt=0, description="the VAE's part")
    finish_seconds: float = Field(600, gt=0, description="encoding one frame, storing the file")
    leave_seconds: float = Field(60, gt=0, description="after the last job, until all ranks have left")

    def ceiling(self, phase: str) -> float:
        """The ceiling of a phase; one without a setting of its own has that of a step."""
        ceiling: float = getattr(self, f"{phase}_seconds", self.denoise_seconds)
        return ceiling


class ParallelConfig(Section):
    """How a job is spread over the ranks; what is left out is chosen for each job by a cost model."""

    cfg_degree: Literal[1, 2] | None = Field(None, description="2: half of the ranks for each branch of guidance")
    ulysses_degree: int | None = Field(
        None, ge=1, le=64, description="ranks that share the heads; with ring_degree they share a branch"
    )
    ring_degree: int | None = Field(None, ge=1, le=64, description="ranks that pass keys and values round")
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
    """Structured logs, of every rank (docs/observability.md)."""

    format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else json")
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is written")
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
