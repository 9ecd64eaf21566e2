"""Teacher of a distillation, checked to be the one that the run began with."""

from yacs.config import CfgNode

from data.build import Data
from engine.build import wrap_teacher
from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.loss import Teacher
from engine.state import TrainState
from models.build import build_teacher


def load_teacher(
    cfg: CfgNode, data: Data, state: TrainState, processes: Processes, *, run: RunDirectory, log: Log
) -> Teacher | None:
    """Return the teacher of the config, None without distillation. Raises ValueError if its weights changed since the run began."""
    if cfg.DISTILL.TYPE == "none":
        return None
    model, description = build_teacher(cfg, data.classes)
    teacher = wrap_teacher(cfg, model, processes)
    if state.update:
        before = (read_manifest(run.manifest).get("teacher") or {}).get("digest", teacher.digest)
        if before != teacher.digest:
            raise ValueError(
                f"DISTILL.TEACHER_WEIGHTS={cfg.DISTILL.TEACHER_WEIGHTS} has changed since {run.path} began (digest {before} -> "
                f"{teacher.digest}); put the file back, or start another run with --tag NAME"
            )
    log.info(f"distilling ({cfg.DISTILL.TYPE}) from {description}; {teacher.describe()}")
    if not cfg.DISTILL.ALPHA:
        log.warning("DISTILL.ALPHA=0: the teacher is evaluated, but its loss has no weight")
    return teacher
