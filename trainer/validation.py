"""Validation within a run: accuracy of the raw and EMA weights, and the best results so far. Evaluations of eval.py: evaluation.py."""

from dataclasses import asdict
from typing import Any

from engine.evaluate import Accuracy, NotFiniteError, describe_not_finite, evaluate
from trainer.session import Session

REMEDY = "start another run with a milder recipe, such as a lower OPTIM.LR, from sound weights"


def evaluate_raw_and_ema(s: Session) -> dict[str, Accuracy]:
    """Evaluate the raw and, if kept, the EMA weights on every validation image; called by all processes."""
    results: dict[str, Accuracy] = {}
    for which, model in s.state.weights().items():
        voting = s.consensus.watch(s.data.val, len(s.data.val), s.check)
        sampled = s.sample_images.keep(voting, -(-s.data.val.num_images // s.processes.world))
        results[which] = evaluate(
            model,
            s.log.track(sampled, len(s.data.val), f"evaluate {which}"),
            s.data.stage.evaluate,
            s.precision,
            s.processes,
            s.data.val.num_images,
            s.cfg.EVAL.FLIP,
        )
    return results


def evaluate_only(s: Session) -> None:
    """Evaluate the weights that the session starts from, and log the results. Raises NotFiniteError for one not finite."""
    results = evaluate_raw_and_ema(s)
    for which, result in results.items():
        s.log.info(f"{which:<3}  {result}")
    for which, result in results.items():
        if not result.finite:
            raise NotFiniteError(f"{describe_not_finite(which, result)}; {REMEDY}")


def find_failure(s: Session, results: dict[str, Accuracy]) -> NotFiniteError | None:
    """Return the error of a run whose last result of its headline weights, or of the only ones, is not finite."""
    which = s.cfg.RECIPE.HEADLINE if s.cfg.RECIPE.HEADLINE in results else "raw"
    if results[which].finite:
        return None
    return NotFiniteError(
        f"{describe_not_finite(which, results[which])}; the run has trained to its end, best {describe_best(s)}; {REMEDY}"
    )


def log_results(s: Session, results: dict[str, Accuracy], epoch: int) -> dict[str, dict[str, Any]]:
    """Log the results of an epoch (from 0); return the entries of those that are the best so far, by kind of weights."""
    new_best: dict[str, dict[str, Any]] = {}
    for which, result in results.items():
        counts = {key: value for key, value in asdict(result).items() if key != "seconds"}
        entry = {"top1": result.top1, "top5": result.top5, **counts, "epoch": epoch + 1, "update": s.state.update}
        is_best = s.state.note_result(which, entry)
        s.log.result(which, result, epoch, s.state.update, is_best)
        if not result.finite:
            s.log.warning(describe_not_finite(which, result))
        if is_best:
            new_best[which] = entry
    return new_best


def describe_best(s: Session) -> str:
    """Return the best results as text, those of RECIPE.HEADLINE first."""
    headline = s.cfg.RECIPE.HEADLINE
    ordered = sorted(s.state.best.items(), key=lambda item: item[0] != headline)
    results = (f"{which} top-1 {best['top1']:.3f} (epoch {best['epoch']})" for which, best in ordered)
    return ", ".join(results) or "none yet"
