"""Whether a job fits into the devices' memory, asked before it runs.

Leaves out the prediction (`parallel.memory`). What the allocator keeps beside is not counted: a job is refused only
when it cannot fit, not when it will be tight.
"""

from collections.abc import Mapping

from daemon.config import Config
from daemon.errors import ErrorCode, PermanentJobError
from parallel.memory import DTYPE_BYTES, JobShape, RankMemory, predict_memory, weight_bytes
from parallel.plan import GenerationPlan
from parallel.sizes import ModelSizes
from parallel.split import ParallelDegrees
from parallel.strategy import MemorySettings

# What the VAE encodes. Each of VACE's alone has it encode two whole videos.
_FRAME_INPUTS = (
    "input_image",
    "end_image",
    "input_video",
    "control_video",
    "reference_image",
    "vace_video",
    "vace_video_mask",
    "vace_reference_image",
    "s2v_pose_video",
)
_REFERENCES = ("reference_image", "vace_reference_image")  # each a latent frame before the video's own


def check_fits(plan: GenerationPlan, models: Mapping[str, ModelSizes], config: Config, *, capacity_bytes: int) -> None:
    """Raises PermanentJobError(out_of_memory), path `parameters`, with the figures, when the job cannot fit.

    `models`: all that are loaded, by name. `capacity_bytes`: of each rank's device.
    """
    for rank in predict_plan(plan, models, config):
        needed = rank.phase_total(rank.fullest_phase)
        if needed > capacity_bytes:
            parts = {"weights": sum(rank.weights.values()), **rank.phases[rank.fullest_phase]}
            shown = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
            raise PermanentJobError(
                ErrorCode.OUT_OF_MEMORY,
                f"{plan.width}x{plan.height} with {plan.num_frames} frames would need {needed / 2**30:.2f} GiB on rank "
                f"{rank.rank} ({shown}), and there are {capacity_bytes / 2**30:.2f} GiB",
                path="parameters",
            )


def predict_plan(plan: GenerationPlan, models: Mapping[str, ModelSizes], config: Config) -> list[RankMemory]:
    """The prediction for a plan on this daemon, with the weights of its other models."""
    memory = MemorySettings(config.memory, config.vram_limit_gib)
    degrees = ParallelDegrees(
        cfg_degree=plan.cfg_degree, ulysses_degree=plan.ulysses_degree, ring_degree=plan.ring_degree
    )
    others = 0
    for name, sizes in models.items():
        if name != plan.model:
            stay, _ = weight_bytes(
                sizes, rank=0, world_size=degrees.world_size, element=DTYPE_BYTES[config.dtype], memory=memory
            )
            others += sum(stay.values())
    return predict_memory(
        models[plan.model],
        JobShape(
            height=plan.height,
            width=plan.width,
            num_frames=plan.num_frames,
            guided=plan.cfg_scale != 1.0,
            tiled=plan.tiled,
            step_cache=plan.tea_cache_l1_thresh is not None,
            frame_inputs=any(getattr(plan, name) is not None for name in _FRAME_INPUTS),
            references=sum(getattr(plan, name) is not None for name in _REFERENCES),
        ),
        degrees=degrees,
        dtype=config.dtype,
        memory=memory,
        on_gpu=config.device != "cpu",
        other_weights=others,
    )
