"""A sweep from where it is to its end: both stages, the winners measured again, the best promoted."""

import contextlib
import json
import posixpath
from typing import Any

from ddpm_core import checkpoint, storage
from jobs.training import run_folder
from jobs.tuning import plan, study
from jobs.tuning import search_space as spaces
from jobs.tuning.monitor import Monitor
from jobs.tuning.runner import LocalRunner, RayRunner
from jobs.tuning.sampling_stage import SamplingStage
from jobs.tuning.training_stage import TrainingStage


class Sweep:
    """One sweep; needs Ray unless its trials run in this process."""

    def __init__(self, job: plan.SweepJob, description: dict[str, Any]) -> None:
        """`description`: the content of sweep.json."""
        self.job, self.output = job, job.args.output
        self.memory = study.Memory(self.output, job.args.study)
        runner = RayRunner(job) if job.args.num_workers else LocalRunner()
        self.monitor = Monitor(self.output, description, self.memory)
        self.training = TrainingStage(job, self.memory, runner, self.monitor.show)
        self.training.later = self.monitor.writer.submit
        self.sampling = SamplingStage(job, self.memory, runner, self.monitor.show)
        self.monitor.watch(self.training, self.sampling)

    def run(self) -> None:
        """Raises SweepError where no trial came to its end."""
        try:
            self._run()
            self.monitor.end("finished", self.sampling.warning)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            with contextlib.suppress(Exception):
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self.monitor.end("interrupted" if interrupted else "failed", "" if interrupted else lines[-1])
            raise
        finally:
            self.monitor.close()
            self.memory.close()

    def _run(self) -> None:
        checkpoint_uri = str(self.job.args.checkpoint)
        if self.job.num_trials:
            checkpoint_uri = self.training.run()
            self._promote(checkpoint_uri, complete=False)
        loaded = checkpoint.load(checkpoint_uri) if self.job.num_points else None
        if loaded is not None:
            self.monitor.state = "sampling"
            best = self.training.best
            self.sampling.run(loaded, "sampling" if best is None else f"sampling-{best}")
            self._promote(checkpoint_uri, complete=False)
        self.monitor.state = "checking"
        self.monitor.show()
        if self.job.num_trials:
            self.training.measure_again()
        if loaded is not None:
            self.sampling.measure_again(loaded)
        self._promote(checkpoint_uri, complete=True)

    def _own(self, folder: str) -> str:
        """A copy of a checkpoint in the sweep's folder: a run that trains on deletes its own."""
        own = storage.join(self.output, "checkpoints", posixpath.basename(folder))
        if not storage.exists(storage.join(own, "config.json")):
            names = [name for name in storage.list_files(folder) if not name.startswith("train_state/")]
            for name in sorted(names, key="config.json".__eq__):  # which is last: then the copy is complete
                storage.write_bytes(storage.join(own, name), storage.read_bytes(storage.join(folder, name)))
        return own

    def _promote(self, checkpoint_uri: str, *, complete: bool) -> None:
        """Point best.json at the best so far."""
        folder, best = checkpoint.resolve(checkpoint_uri)
        if self.training.best is not None:
            best = run_folder.read_best(self.job.run_of(self.training.best))
        if not folder.startswith(f"{self.output}/"):
            folder = self._own(folder)
        content: dict[str, Any] = {"checkpoint": folder.removeprefix(f"{self.output}/"), "metric": best.get("metric")}
        if self.sampling.values:
            fields, ema = spaces.sampling_options(self.sampling.values)
            content |= {"ema_sigma_rel": ema, **fields}
        else:
            content |= {name: value for name, value in best.items() if name not in ("checkpoint", "metric", "epochs")}
        done = {"num_trials": self.job.num_trials, "num_points": self.job.num_points} if complete else {}
        content["sweep"] = {"trial": self.training.best, "point": self.sampling.chosen, **done}
        storage.write_bytes(storage.join(self.output, "best.json"), json.dumps(content, indent=2).encode())
        self.memory.sync()
