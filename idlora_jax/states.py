"""Training states on disk: whole or absent, and written while training goes on.

    with opened(folder, keep=2, keep_best=1) as states:
        states.save(step, state, meta)      returns when the state has been copied
        states.check()                      raises what went wrong in the background
        states.wait()                       returns when all of it is on disk

A state is written under a temporary name and renamed, so that a kill leaves it whole or
not at all; what a kill left half-written is removed when the folder is opened again.
The newest `keep` states stay and the `keep_best` with the lowest held-out loss.

Several processes save and restore a state together, in one folder that all can reach:
each writes and reads the parts of its own devices. A state may be restored to other
devices, or to more or fewer of them, than it was saved from.

Orbax copies the arrays to the host before `save` returns, and JAX does not reuse memory
that the host still looks at, so that the next step may take the state over.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

PathLike = str | os.PathLike[str]
Data = bytes | dict[str, Any]
Job = Callable[[], Any]
_BYTES = "base64"
"""How the position of a reader that gives bytes is named in JSON."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax prints the tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _manager(folder: PathLike, *, alone: bool = False, **options: Any) -> Any:
    """Orbax's; `alone`: without waiting for other processes."""
    import orbax.checkpoint as ocp  # seconds to import, and only training needs it

    me = jax.process_index()
    mine = ocp.options.MultiprocessingOptions(me, {me}, f"process_{me}")
    options |= {"multiprocessing_options": mine} if alone else {}
    made = ocp.CheckpointManagerOptions(save_root_metadata=False, **options)
    return ocp.CheckpointManager(Path(folder).resolve(), options=made)


def _negative(metrics: dict[str, float]) -> float:
    """How good a state is; one without a known loss is the worst."""
    return -metrics.get("loss", math.inf)


def _kept(keep: int, best: int) -> Any:
    """The newest `keep` states, and the best `best`."""
    from orbax.checkpoint import checkpoint_managers as policies

    rules: list[Any] = [policies.LatestN(keep)]
    if best:
        rules += [policies.BestN(get_metric_fn=_negative, n=best)]
    return policies.AnyPreservationPolicy(rules)


@contextlib.contextmanager
def _telling(folder: Path, step: int) -> Iterator[None]:
    """One clear error for all that can go wrong while a state is written."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            getattr(error, "errno", None),
            f"could not save the state after {step} steps in {folder} ({reason}); "
            "the states and adapters saved before are still there: free some disk "
            "space and go on with --resume",
        ) from error


@dataclass(frozen=True)
class States:
    """An open folder of training states; from `opened`.

    Attributes:
        folder: of the states, one folder a step.
        manager: Orbax's.
        worker: runs what is written beside the states.
        pending: what it has been given, by the step it belongs to.
    """

    folder: Path
    manager: Any
    worker: concurrent.futures.Executor
    pending: dict[int, list[Any]] = field(default_factory=dict)

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        *,
        loss: float | None = None,
        data: Data | None = None,
        beside: tuple[Job, ...] = (),
    ) -> None:
        """Begin to write a state; the one before is finished first.

        All processes call it with their parts of the same state.

        Args:
            step: its number; a step that is there already is left alone.
            state: any tree of arrays. It may be donated as soon as this returns.
            meta: anything JSON, for `meta_of` to return.
            loss: held-out, where it is known: the lowest ones are kept.
            data: position of a reader of the data that has one of its own.
            beside: what else to write, in the background; each is called once.

        Raises:
            OSError: if the state before could not be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if step not in self.manager.all_steps():
            said = meta | {"data": _to_json(data)}
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(said)
            )
            # Comparisons with NaN would put any state first.
            at = math.inf if loss is None else float(loss)
            metrics = {"loss": at} if math.isfinite(at) else {}
            with _telling(self.folder, step):
                self.manager.save(step, args=items, metrics=metrics)
        self.pending.clear()
        self.pending[step] = [self.worker.submit(job) for job in beside]

    @property
    def saved(self) -> int | None:
        """The newest state, which may still be in the making."""
        return self.manager.latest_step()

    def check(self) -> None:
        """Raise what went wrong in the background, if anything has by now.

        Raises:
            OSError: if a state, or what stands beside it, could not be written.
        """
        if not self.manager.is_saving_in_progress():
            self._finish(lambda job: job.done())

    def wait(self) -> None:
        """Return when everything is on disk; see `check`."""
        self._finish(lambda job: True)

    def _finish(self, ready: Callable[[Any], bool]) -> None:
        step = max(self.pending, default=0)
        with _telling(self.folder, step):
            self.manager.wait_until_finished()
        for jobs in self.pending.values():
            for job in [job for job in jobs if ready(job)]:
                jobs.remove(job)
                job.result()


@contextlib.contextmanager
def opened(folder: PathLike, *, keep: int, keep_best: int = 0) -> Iterator[States]:
    """Open a folder to save states in; on leaving, everything is on disk.

    Args:
        folder: of the states; made if it is missing. Only one run may have it open.
        keep: how many of the newest states stay.
        keep_best: how many of those with the lowest held-out loss stay, too.

    Raises:
        OSError: on leaving, if the last state could not be written.
    """
    policy = _kept(keep, keep_best)
    options = {"preservation_policy": policy, "best_fn": _negative}
    with (
        _quiet(),
        concurrent.futures.ThreadPoolExecutor(1) as worker,
        contextlib.closing(
            _manager(folder, cleanup_tmp_directories=True, **options)
        ) as manager,
    ):
        states = States(Path(folder), manager, worker)
        try:
            yield states
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                states.wait()
            raise
        states.wait()


@contextlib.contextmanager
def _reading(folder: PathLike, *, alone: bool) -> Iterator[Any]:
    with _quiet():
        options = {"create": False, "enable_async_checkpointing": False}
        made = _manager(folder, alone=alone, **options)
        with contextlib.closing(made) as manager:
            yield manager


def latest(folder: PathLike) -> int | None:
    """The newest step saved in a folder, or None."""
    if not Path(folder).is_dir():
        return None
    with _reading(folder, alone=True) as manager:
        return manager.latest_step()


def meta_of(folder: PathLike, step: int) -> dict[str, Any]:
    """What was given as `meta` with a state, and as `data` under that name."""
    import orbax.checkpoint as ocp

    wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
    try:
        with _reading(folder, alone=True) as manager:
            meta = manager.restore(step, args=wanted)["meta"]
    except (ValueError, KeyError, OSError) as error:
        raise _damaged(folder, step, error) from None
    return meta | {"data": _from_json(meta.get("data"))}


def restore(folder: PathLike, step: int, like: Any) -> Any:
    """Read a training state.

    Args:
        folder: as given to `opened`.
        step: which one (`latest`).
        like: a tree of arrays (or shapes with shardings) of the same structure; what
            is read lies as they do. All processes call it with their parts.

    Raises:
        ValueError: if it is damaged, or its shapes are not those of `like`.
    """
    import orbax.checkpoint as ocp

    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
    try:
        with _reading(folder, alone=False) as manager:
            return manager.restore(step, args=wanted)["state"]
    except (ValueError, KeyError, OSError) as error:
        raise _damaged(folder, step, error) from None


def _damaged(folder: PathLike, step: int, error: Exception) -> ValueError:
    return ValueError(
        f"{folder}/{step}: this training state is damaged or of another adapter "
        f"({str(error).splitlines()[0]}); delete it to resume from an older one"
    )


def _to_json(data: Data | None) -> Any:
    if isinstance(data, bytes):
        return {_BYTES: base64.b64encode(data).decode()}
    return data


def _from_json(data: Any) -> Data | None:
    if isinstance(data, dict) and [*data] == [_BYTES]:
        return base64.b64decode(data[_BYTES])
    return data
