"""The LoRAs of a job: from the names that publishers give to files that fit the model.

Owns which files a name may mean, and every way in which a job's LoRA is refused: always `input_rejected`, with the path
of the field. Only headers are read. Leaves out putting them into the weights (`parallel.lora`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from daemon.errors import ErrorCode, PermanentJobError
from daemon.faults import Faults
from daemon.job import Lora
from daemon.sections import LoraConfig
from parallel.layouts import LayoutError, read_layout
from parallel.lora_layout import TARGETS, LayerShapes, LoraError, match_lora
from parallel.plan import LoraPlan


def check_loras(configured: Sequence[LoraConfig], faults: Faults) -> None:
    """Checks what is configured on disk."""
    for index, lora in enumerate(configured):
        where = f"loras.{index}.path"
        try:
            if lora.path.is_file():
                read_layout(lora.path)
            elif not lora.path.is_dir():
                faults.add(where, f"{lora.path}: no such file or directory")
        except LayoutError as error:
            faults.add(where, str(error))
        except OSError as error:
            faults.add(where, f"{lora.path}: {error.strerror}")


def resolve_loras(
    asked: Sequence[Lora], configured: Sequence[LoraConfig], shapes: Mapping[str, LayerShapes]
) -> tuple[LoraPlan, ...]:
    """Finds and checks the files of a job's LoRAs. `shapes`: the model's linear layers, by DiT and name.

    Raises PermanentJobError(input_rejected), whose path names the LoRA and the field at fault.
    """
    return tuple(_resolve(lora, configured, shapes, f"loras.{index}") for index, lora in enumerate(asked))


def _resolve(lora: Lora, configured: Sequence[LoraConfig], shapes: Mapping[str, LayerShapes], where: str) -> LoraPlan:
    shelf, file = _find(lora.name, configured, f"{where}.name")
    target = lora.target or shelf.target
    dits = [dit for dit in TARGETS[target] if dit in shapes]
    if not dits or (target != "both" and len(shapes) == 1):
        raise _rejected(f"{target}: this model has one DiT, not two experts", f"{where}.target")
    try:
        layout = read_layout(file)
        for dit in dits:
            match_lora(layout, shapes[dit])
        status = file.stat()
    except (LoraError, LayoutError) as error:
        # Publishers are told the name that they gave, not where the file lies.
        raise _rejected(f"{lora.name}: {str(error).replace(str(file), file.name)}", f"{where}.name") from error
    except OSError as error:
        raise _rejected(f"{lora.name}: cannot be read: {error.strerror}", f"{where}.name") from error
    version = f"{status.st_size}-{status.st_mtime_ns}"
    return LoraPlan(name=lora.name, path=str(file), strength=lora.strength, target=target, version=version)


def _find(name: str, configured: Sequence[LoraConfig], where: str) -> tuple[LoraConfig, Path]:
    first, _, rest = name.partition("/")
    for shelf in configured:
        if shelf.name != first:
            continue
        if not rest and not shelf.path.is_dir():
            return shelf, shelf.path
        file = (shelf.path / f"{rest}.safetensors").resolve()
        # A link may lead elsewhere inside the directory, but not out of it.
        if rest and file.is_relative_to(shelf.path.resolve()) and file.is_file():
            return shelf, file
    raise _rejected(f"no LoRA {name!r} is configured for this worker", where)


def _rejected(message: str, path: str) -> PermanentJobError:
    return PermanentJobError(ErrorCode.INPUT_REJECTED, message, path=path)
