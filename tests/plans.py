"""A plan for tests: small, of text, on one rank.

What a test is about it changes by `dataclasses.replace`.
"""

from parallel.plan import GenerationPlan

PLAN = GenerationPlan(
    job_id="job",
    attempt=1,
    task="text_to_video",
    model="tiny-t2v",
    prompt="a red fox runs through snow",
    negative_prompt="",
    seed=1,
    height=64,
    width=96,
    num_frames=9,
    num_inference_steps=2,
    cfg_scale=5.0,
    sigma_shift=5.0,
    switch_boundary=0.875,
    input_image=None,
    time_limit_seconds=60.0,
)
