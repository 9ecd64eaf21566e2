"""Session: all objects of one start of a run, built from the config, with the state where the run continues."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from torch import nn
from yacs.config import CfgNode

import config
from data.build import Data, build_data
from engine.batch_plan import accumulation_steps
from engine.build import build_compilation, build_loop, build_plan, build_state, prepare_model, wrap_model
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.manifest import describe_start, read_manifest, record_start
from engine.checkpoint.run_directory import RunDirectory, RunLockedError
from engine.compilation import Compilation
from engine.default_generators import seed_default_generators
from engine.distributed.consensus import Consensus, Vote
from engine.distributed.processes import Processes
from engine.distributed.signals import PreemptedError
from engine.logging.log import Log
from engine.logging.trackers import check_wandb
from engine.loop import Loop
from engine.loss import Teacher
from engine.precision import Precision
from engine.state import TrainState
from models.build import announce_custom_model, build_model, checkpoint_blocks, custom_model_metadata
from models.kernels.apex_norm import use_apex_norms
from trainer.resume import check_same_run, restore
from trainer.sample_images import SampleImages
from trainer.teacher import load_teacher

IMAGENET = 1_281_167, 50_000, 1000  # training images, validation images, classes


@dataclass
class Session:
    """Objects of one start of a run."""

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
        """Create the log files of the run directory, or continue them from the run's position."""
        self.log.open(
            self.run.path,
            self.state.update,
            tensorboard=self.cfg.LOG.TENSORBOARD,
            closed=self.state.closed,
            wandb=self.cfg.LOG.WANDB,
            config=yaml.safe_load(config.dump(self.cfg)),
        )

    def check(self, vote: Vote) -> None:
        """Raise PreemptedError or SavingError if the processes voted to stop or to fail."""
        if vote == Vote.STOP:
            raise PreemptedError
        if vote == Vote.FAIL:
            raise self.saver.saving_error()

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the run's checkpoints and weight files."""
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
    cfg: CfgNode,
    args: argparse.Namespace,
    processes: Processes,
    *,
    run: RunDirectory,
    log: Log,
    saver: AsyncSaver,
    interrupted: Callable[[], bool],
) -> Session:
    """Build all objects and restore the state; `interrupted` returns whether a stop signal came.

    Raises ValueError for errors that the user can correct.
    """
    check_start(cfg, args, processes, run=run, log=log)
    announce_custom_model(cfg, log.info)
    data = build_session_data(cfg, args, processes, run=run, log=log)
    plan = build_plan(cfg, processes, data.train.updates_per_epoch)
    precision = Precision(cfg.TRAIN.AMP, processes.device)
    model = build_session_model(cfg, len(data.classes), processes)
    compilation = build_compilation(cfg, model, plan, processes.device)
    state = build_state(cfg, model, plan, precision)
    restore(cfg, args, state, data, processes, run=run, log=log, saver=saver)
    if compilation and not args.dry_run:
        compilation.apply(state.weights().values())
    done = args.eval or state.complete
    teacher = None if done else load_teacher(cfg, data, state, processes, run=run, log=log)
    loop = build_loop(
        cfg,
        wrap_model(cfg, model, plan, processes),
        prepare=data.stage.train,
        precision=precision,
        processes=processes,
        teacher=teacher,
    )
    session = Session(
        cfg=cfg,
        processes=processes,
        log=log,
        run=run,
        saver=saver,
        data=data,
        precision=precision,
        state=state,
        loop=loop,
        teacher=teacher,
        consensus=Consensus(processes, lambda: local_vote(saver, interrupted())),
        sample_images=SampleImages(
            every=cfg.LOG.PICTURES_EVERY,
            evaluated_every=cfg.EVAL.EVERY,
            stage=data.stage,
            classes=data.classes,
            smoothing=cfg.AUG.LABEL_SMOOTHING,
            log=log,
        ),
        compilation=compilation,
    )
    if not (done or args.dry_run):
        processes.on_main(lambda: open_run(session))
    return session


def check_start(cfg: CfgNode, args: argparse.Namespace, processes: Processes, *, run: RunDirectory, log: Log) -> None:
    """Lock the run directory for a training run. Raises ValueError if the config or the directory does not allow the start."""
    check_wandb(cfg.LOG.WANDB)
    accumulation_steps(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes.world)
    if args.dry_run and args.eval:
        raise ValueError("--dry-run and --eval exclude each other; give one of them")
    processes.on_main(run.check_files)
    if not (args.eval or args.dry_run) and (warning := processes.on_main(run.lock, (RunLockedError,))):
        log.warning(warning)
    if not args.eval:
        read_manifest(run.manifest)  # raises now, rather than after minutes, if it is damaged
    check_same_run(cfg, run, log)


def build_session_data(
    cfg: CfgNode, args: argparse.Namespace, processes: Processes, *, run: RunDirectory, log: Log
) -> Data:
    """Build the data of the run; a dry run without DATA.PATH counts synthetic images of ImageNet-1k's size."""
    substitute = args.dry_run and cfg.DATA.LOADER != "synthetic" and not cfg.DATA.PATH
    if substitute and run.checkpoints.latest():
        raise ValueError(
            f"DATA.PATH is not set and {run.path} holds a run on other images; give its data with --data-path"
        )
    log_info = log.info if processes.main else None
    data_cfg = as_imagenet(cfg) if substitute else cfg
    data = build_data(data_cfg, processes.rank, processes.world, processes.device, log_info)
    if substitute:
        data.notes.append("DATA.PATH is not set: images are counted as ImageNet-1k's")
    return data


def as_imagenet(cfg: CfgNode) -> CfgNode:
    """Return the config with a synthetic data set of ImageNet-1k's size."""
    synthetic = cfg.clone()
    synthetic.defrost()
    synthetic.DATA.LOADER = "synthetic"
    synthetic.DATA.SYNTHETIC_TRAIN, synthetic.DATA.SYNTHETIC_VAL, classes = IMAGENET
    synthetic.DATA.SYNTHETIC_CLASSES = cfg.MODEL.NUM_CLASSES or classes
    return synthetic


def build_session_model(cfg: CfgNode, num_classes: int, processes: Processes) -> nn.Module:
    """Build the model from the run's seed, prepared for training on this process's device."""
    torch.backends.cudnn.benchmark = cfg.TRAIN.BENCHMARK
    torch.backends.cudnn.deterministic = not cfg.TRAIN.BENCHMARK
    seed_default_generators(cfg.TRAIN.SEED)
    model = build_model(cfg, num_classes)
    if cfg.MODEL.NORM_BACKEND == "apex":
        use_apex_norms(model)
    model = prepare_model(model, processes, cfg.MODEL.SYNC_BN)
    checkpoint_blocks(model, cfg.TRAIN.CHECKPOINT_BLOCKS)
    return model


def local_vote(saver: AsyncSaver, interrupted: bool) -> Vote:
    """Return the vote of this process."""
    return Vote.FAIL if saver.failed else Vote.STOP if interrupted else Vote.GO_ON


def open_run(s: Session) -> None:
    """Create or continue the files of the run directory. Raises ValueError if they cannot be written."""
    start = describe_start(s.processes.world, s.state.update, s.processes.device)
    try:
        s.run.write_config(config.dump(s.cfg))
        record_start(
            s.run.manifest,
            s.metadata(),
            {**start, **custom_model_metadata(s.cfg), "config": yaml.safe_load(config.dump(s.cfg))},
        )
        s.open_log()
    except OSError as error:
        raise s.run.write_error(error) from error
