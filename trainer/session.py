"""One start of a run: everything that train.py needs, built from the config, and where it continues."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

import config
from common.rng import seed_default_generators
from data.build import Data, build_data
from engine.batch_plan import accumulation
from engine.build import build_compilation, build_loop, build_plan, build_state, prepare_model, wrap_model
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.run_directory import RunDirectory, describe_start
from engine.compilation import Compilation
from engine.distributed.consensus import Consensus, Vote
from engine.distributed.processes import Processes
from engine.distributed.signals import PreemptedError
from engine.logging.log import Log
from engine.logging.trackers import check_wandb
from engine.loop import Loop
from engine.loss import Teacher
from engine.precision import Precision
from engine.state import TrainState
from models.build import build_model, checkpoint_blocks, custom_model_metadata
from models.kernels.apex_norm import use_apex_norms
from trainer.resume import check_same_run, find_teacher, restore
from trainer.sample_images import SampleImages

# What may differ between two starts of one run: it changes no number, or only how they round.
FREE = (
    "OUTPUT",
    "NAME",
    "TAG",
    "DEVICE",
    "RECIPE.HEADLINE",
    "TRAIN.BENCHMARK",
    "MODEL.NORM_BACKEND",
    "TRAIN.CHECKPOINT_BLOCKS",
    "TRAIN.COMPILE",
    "OPTIM.BACKEND",
    "DATA.CLASS_INDEX",  # what it orders must be the same
    "DATA.PATH",
    "DATA.VAL_LABELS",
    "DATA.WORKERS",
    "DATA.PREFETCH",
    "DATA.MAX_BAD_SHARE",
    "EVAL.BATCH",
    "TRAIN.MAX_SKIPPED",
    "CHECKPOINT",
    "DIST.START_TIMEOUT",
    "DIST.TIMEOUT",
    "DIST.BUCKET_MB",
    "DIST.STATIC_GRAPH",
    "LOG",
    "MODEL.INIT",
    "MODEL.MODULE",  # the file may lie elsewhere; the manifest notes its digest
    "MODEL.INIT_WEIGHTS",
    "MODEL.KERNELS",
    "DISTILL.TEACHER_WEIGHTS",  # what is in the file must be the same
)
IMAGENET = 1_281_167, 50_000, 1000  # training images, validation images, classes


@dataclass
class Session:
    """One start of a run: what train.py builds before it trains."""

    cfg: CfgNode
    processes: Processes
    log: Log
    run: RunDirectory
    saver: AsyncSaver
    data: Data
    precision: Precision
    state: TrainState
    loop: Loop
    teacher: Teacher | None
    consensus: Consensus
    sample_images: SampleImages
    compilation: Compilation | None = None

    def open_log(self) -> None:
        """Begin the files of the run directory, or go on in them where the run stands."""
        how, plain = self.cfg.LOG, yaml.safe_load(config.dump(self.cfg))
        self.log.open(self.run.path, self.state.update, how.TENSORBOARD, self.state.closed, how.WANDB, plain)

    def check(self, vote: Vote) -> None:
        """Raise what ends the run if the processes agreed on it."""
        if vote == Vote.STOP:
            raise PreemptedError
        if vote == Vote.FAIL:
            raise self.saver.saving_error()

    def metadata(self) -> dict[str, Any]:
        """Return what a reader of a checkpoint wants to know about it."""
        return {
            "model": self.cfg.MODEL.NAME,
            "num_classes": len(self.data.classes),
            "classes": self.data.classes,
            "img_size": self.cfg.DATA.IMG_SIZE,
            "mean": list(self.cfg.DATA.MEAN),
            "std": list(self.cfg.DATA.STD),
            **({"evaluation": asdict(self.data.transform)} if self.data.transform else {}),
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "seed": self.cfg.TRAIN.SEED,
            "data": self.data.fingerprint,
            **({"teacher": {"model": self.cfg.DISTILL.TEACHER, "digest": self.teacher.digest}} if self.teacher else {}),
        }


def build_session(
    cfg: CfgNode, args: argparse.Namespace, processes: Processes, saver: AsyncSaver, interrupted: Callable[[], bool]
) -> Session:
    """Build everything and continue where the run stands; `interrupted` says whether a signal came.

    Raises ValueError for what the user can mend.
    """
    log, run = saver.log, saver.run
    torch.backends.cudnn.benchmark = cfg.TRAIN.BENCHMARK
    torch.backends.cudnn.deterministic = not cfg.TRAIN.BENCHMARK
    check_wandb(cfg.LOG.WANDB)
    accumulation(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes.world)
    if args.dry_run and args.eval:
        raise ValueError("--dry-run and --eval exclude each other; give one of them")
    stands_in = args.dry_run and cfg.DATA.LOADER != "synthetic" and not cfg.DATA.PATH
    if not (args.eval or args.dry_run) and (warning := processes.on_main(run.lock)):
        log.warning(warning)
    if not args.eval:
        run.read_manifest()  # a damaged one is said now, not after minutes
    check_same_run(cfg, run, log, FREE)
    if stands_in and run.checkpoints.latest():
        raise ValueError(
            f"DATA.PATH is not set and {run.path} holds a run on other images; give its data with --data-path"
        )
    say = log.info if processes.main else None
    data = build_data(as_imagenet(cfg) if stands_in else cfg, processes.rank, processes.world, processes.device, say)
    if stands_in:
        data.notes.append("DATA.PATH is not set: images are counted as ImageNet-1k's")
    plan = build_plan(cfg, processes, data.train.updates_per_epoch)
    precision = Precision(cfg.TRAIN.AMP, processes.device)
    seed_default_generators(cfg.TRAIN.SEED)
    model = build_model(cfg, len(data.classes))
    if cfg.MODEL.NORM_BACKEND == "apex":
        use_apex_norms(model)
    model = prepare_model(model, processes, cfg.MODEL.SYNC_BN)
    checkpoint_blocks(model, cfg.TRAIN.CHECKPOINT_BLOCKS)
    compilation = build_compilation(cfg, model, processes)
    state = build_state(cfg, model, plan, precision)
    restore(cfg, args, saver, state, data, processes)
    if compilation and not args.dry_run:
        compilation.apply(state.weights().values())
    teacher = None if args.eval or state.complete else find_teacher(cfg, run, state, data, processes, log)
    loop = build_loop(cfg, wrap_model(model, processes, cfg), data.stage.train, precision, processes, teacher)
    consensus = Consensus(processes, lambda: own_vote(saver, interrupted()))
    sample_images = SampleImages(
        cfg.LOG.PICTURES_EVERY, cfg.EVAL.EVERY, data.stage, data.classes, cfg.AUG.LABEL_SMOOTHING, log
    )
    parts = data, precision, state, loop, teacher, consensus, sample_images, compilation
    session = Session(cfg, processes, log, run, saver, *parts)
    if not (args.eval or args.dry_run or state.complete):
        processes.on_main(lambda: open_run(session))
    return session


def open_run(s: Session) -> None:
    """Begin or continue the files of the run directory. Raises ValueError if they cannot be written."""
    start = describe_start(s.processes.world, s.state.update, s.processes.device)
    try:
        s.run.write_config(config.dump(s.cfg))
        s.run.record_start(
            s.metadata(), {**start, **custom_model_metadata(s.cfg), "config": yaml.safe_load(config.dump(s.cfg))}
        )
        s.open_log()
    except OSError as error:
        raise s.run.write_error(error) from error


def as_imagenet(cfg: CfgNode) -> CfgNode:
    """Return the config with a stand-in of ImageNet-1k's size for the images that a dry run was not given."""
    stand_in = cfg.clone()
    stand_in.defrost()
    stand_in.DATA.LOADER = "synthetic"
    stand_in.DATA.SYNTHETIC_TRAIN, stand_in.DATA.SYNTHETIC_VAL, classes = IMAGENET
    stand_in.DATA.SYNTHETIC_CLASSES = cfg.MODEL.NUM_CLASSES or classes
    return stand_in


def own_vote(saver: AsyncSaver, interrupted: bool) -> Vote:
    """Return what this process wants all to do."""
    return Vote.FAIL if saver.failed else Vote.STOP if interrupted else Vote.GO_ON
