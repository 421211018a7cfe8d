"""Bodies of job messages: good ones, and every way to get one wrong.

Leaves out the AMQP properties around them (`tests.amqp_properties`).
"""

import json
from typing import Any

from hypothesis import strategies as st

FULL: dict[str, Any] = {
    "schema": "reeld.job/1",
    "job_id": "job-1",
    "task": "image_to_video",
    "prompt": "ein Fuchs läuft durch den Schnee 🦊",
    "negative_prompt": "blurry",
    "parameters": {
        "seed": 0,
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "num_inference_steps": 50,
        "cfg_scale": 5,
        "sigma_shift": 3.0,
    },
    "inputs": {"input_image": "https://example.org/first.png"},
    "loras": [],
    "output": {"fps": 16},
    "time_limit_seconds": 600,
    "metadata": {"customer": 7, "tags": ["a", {"b": None}]},
}
LEAST = {"schema": "reeld.job/1", "task": "text_to_video", "prompt": "a fox"}

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))  # lone surrogates too
    | st.sampled_from(["", "reeld.job/1", "text_to_video", "NaN", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [(name,) for name in FULL] + [
    (name, key) for name in ("parameters", "inputs", "output", "metadata") for key in FULL[name]
]


@st.composite
def mutated_bodies(draw: st.DrawFn) -> bytes:
    """A full job with some fields replaced, removed or added, and perhaps cut or with a byte changed."""
    document = json.loads(json.dumps(FULL))
    for path in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        holder = document if len(path) == 1 else document.get(path[0])
        if not isinstance(holder, dict):
            continue
        if draw(st.booleans()):
            holder[path[-1]] = draw(JSON_VALUES)
        else:
            holder.pop(path[-1], None)
    if draw(st.booleans()):
        document[draw(st.text(st.characters(exclude_categories=()), max_size=5))] = draw(JSON_VALUES)
    raw = bytearray(json.dumps(document).encode())
    if draw(st.booleans()):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)
