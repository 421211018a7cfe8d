"""The plan of one generation: everything random or time-dependent already resolved.

Owns the closed vocabulary that rank 0 sends to the peers and gets back from them: `GenerationPlan`, the
commands `Generate` and `Shutdown`, and `Outcome`. All of it is small JSON, never a pickle. Leaves out how it
travels (`parallel.world`) and what is done with it (`parallel.engine`). Imports no torch, so that the command
line can use it.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlan:
    """One LoRA of a plan, resolved: `path` is a safetensors file that rank 0 can read.

    `target` is `both`, `high_noise` or `low_noise`: the expert whose weights it changes (a model with one DiT has only
    `both`). `version` tells a replaced file from the one that is cached.
    """

    name: str
    path: str
    strength: float
    target: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """What every rank needs to generate one job, and nothing else.

    The names are DiffSynth's own arguments of `WanVideoPipeline.__call__`. `height`, `width` and `num_frames`
    are already rounded as DiffSynth rounds them; `seed` is never absent, because with `seed=None` every rank
    would draw noise of its own.
    """

    job_id: str
    attempt: int
    task: str
    model: str
    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    cfg_scale: float
    sigma_shift: float
    switch_boundary: float
    input_image: str | None
    time_limit_seconds: float
    # What belongs to some tasks only (parallel.tasks). Inputs are paths of staged files, which rank 0 alone reads;
    # None leaves DiffSynth's own default.
    end_image: str | None = None
    input_video: str | None = None
    control_video: str | None = None
    reference_image: str | None = None
    vace_video: str | None = None
    vace_video_mask: str | None = None
    vace_reference_image: str | None = None
    input_audio: str | None = None
    s2v_pose_video: str | None = None
    denoising_strength: float | None = None
    vace_scale: float | None = None
    camera_control_direction: str | None = None
    camera_control_speed: float | None = None
    motion_bucket_id: int | None = None
    loras: tuple[LoraPlan, ...] = ()
    # How the job is split over the ranks (parallel.split), and what it may trade exactness for.
    cfg_degree: int = 1
    ulysses_degree: int = 1
    ring_degree: int = 1
    tea_cache_l1_thresh: float | None = None
    # Whether the VAE works on DiffSynth's tiles instead of whole frames: less memory, three times the work.
    tiled: bool = False


@dataclass(frozen=True, slots=True)
class Generate:
    """Command: every rank generates this plan."""

    plan: GenerationPlan


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Command: every rank leaves and exits 0."""

    reason: str


Command = Generate | Shutdown


_PLAN_FIELDS = {field.name for field in fields(GenerationPlan)}


def encode_command(command: Command) -> bytes:
    """Encodes a command as JSON, UTF-8."""
    match command:
        case Generate(plan=plan):
            message = {"command": "generate", "plan": asdict(plan)}
        case Shutdown(reason=reason):
            message = {"command": "shutdown", "reason": reason}
    return json.dumps(message, separators=(",", ":")).encode()


def decode_command(data: bytes) -> Command:
    """Decodes `encode_command`'s bytes. Raises ValueError on what this version does not know."""
    match json.loads(data):
        case {"command": "generate", "plan": dict(plan)} if plan.keys() == _PLAN_FIELDS:
            return Generate(plan=_plan_from(plan))
        case {"command": "shutdown", "reason": str(reason)}:
            return Shutdown(reason=reason)
        case _:
            raise ValueError("a command of another form: are all ranks of one version of reeld?")


def _plan_from(values: dict[str, Any]) -> GenerationPlan:
    loras = tuple(LoraPlan(**lora) for lora in values.pop("loras"))
    return GenerationPlan(**values, loras=loras)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one rank's part of a job ended. `code` is None when it went well; `place`: `parallel.collectives.place`."""

    rank: int
    code: str | None = None
    message: str = ""
    place: int = 0

    @property
    def ok(self) -> bool:
        return self.code is None

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> "Outcome":
        return Outcome(**json.loads(text))
