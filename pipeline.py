"""The whole of MIMU: classifier -> graphs -> GCN -> sweep over top_k x kappa -> report.

Stages are kept under the hash of all their inputs, and so is every record: what is there is not measured again.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from core.config import KappaModes, PipelineConfig, Trackers
from core.hashes import load_plugins, sha256_file
from core.observe import progress
from core.records import Record, record_path
from core.store import Finished
from measure.auto_kappa import Search, check_provable, search
from measure.metrics import chosen_metrics
from model import HookedModel
from reporter import Reporter
from rivals.compared import chosen_methods
from stages.chain import Stages
from stages.evaluation import Evaluation
from stages.preflight import say, understood
from training.distributed import prepare_process

__all__ = ["Pipeline", "PipelineConfig"]
T = TypeVar("T")


class Pipeline:
    """One run of MIMU: its stages, the evaluation of their products, and the reporter of the records.

    Args:
        config: what to do. Products passed in by path (`trained_vision_model_path`, `graph_dir`, `gcn_path`)
            are used instead of computed.

    Raises:
        UserError: the configuration cannot be run; said before anything is trained.
    """

    def __init__(self, config: PipelineConfig):
        load_plugins(config.plugins)
        names = chosen_methods(config.eval.methods)
        chosen_metrics(config.eval.metrics)
        self.stages = Stages(replace(config, eval=replace(config.eval, methods=names)))
        self.evaluation = Evaluation(self.stages)
        self.reporter = Reporter(config.output_dir, config.reporter)

    def run(self) -> list[Record]:
        """Run all stages, then write the report; returns one record per (top_k, kappa) point."""
        records = self.measure()
        self.reporter.plot(records)
        return records

    def measure(self) -> list[Record]:
        """Run all stages, and show their results where training curves are shown; returns as `run` does."""
        self.preflight()
        records = self.eval()
        self._show_results(records)
        return records

    def prepare_process(self) -> None:
        """Let this process keep freed memory for the next tensors and take the threads that pay; see `training`.

        A program calls this once, before it runs anything; constructing a `Pipeline` sets nothing for the process.
        """
        prepare_process(self.stages.device, self.stages.setup.multiplications)

    def train_gcn(self) -> Path:
        """Train the graph network alone, or find it (the ELBO: for the first top_k); returns its file."""
        self.preflight(measures=False)
        return self.run_gcn_training(self.config.topK_list[0])

    def preflight(self, measures: bool = True) -> None:
        """Log what the run understood: data, classes, what is given, what will be made, settings without effect.

        Args:
            measures: whether methods will be measured.
        """
        say(self.stages, measures)

    def with_others(self, work: Callable[[], T]) -> T | None:
        """Do the work, in the first of torchrun's processes; the others help it to train, and get None."""
        if self.stages.take_part():
            return None
        done = work()
        self.stages.dismiss()
        return done

    def run_vision_model_training(self) -> Path:
        """Train the classifier (or take the given one); returns its checkpoint."""
        return self.stages.run_vision_model_training()

    def run_gcn_graph_generation(self) -> Path:
        """Make the graphs (or take the given ones); returns their folder."""
        return self.stages.run_gcn_graph_generation()

    def run_gcn_training(self, topK: int) -> Path:
        """Train the GCN (the ELBO: one for each topK), or take the given one; returns its file."""
        return self.stages.run_gcn_training(topK)

    def eval(self) -> list[Record]:
        """Measure every point of the sweep, or find the record that is there.

        Returns:
            One record per (top_k, kappa); with `kappa: auto` one per top_k, at the kappa that the search finds.
        """
        config = self.stages.config
        if config.kappa is KappaModes.list:
            points = [(k, kappa) for k in config.topK_list for kappa in config.kappa_list]
            return [self.run_single_evaluation_round(*point) for point in progress(points, "sweep")]
        labels = self.stages.data.splits["val"].labels
        forgotten = int(self.stages.data.is_forgotten(labels).sum())
        check_provable(config.auto, forgotten, len(labels) - forgotten)
        found = [(top_k, search(self.evaluation.eval.context, top_k)) for top_k in config.topK_list]
        return [self.run_single_evaluation_round(top_k, outcome.kappa, outcome) for top_k, outcome in found]

    def run_single_evaluation_round(self, topK: int, kappa: int, auto: Search | None = None) -> Record:
        """Measure every method at one point; write and return its record (or return the one that is there).

        Args:
            topK: weights that a mask names while the GCN is trained.
            kappa: weights that a mask switches off.
            auto: the search that chose kappa; its outcome goes into the record and the masks.
        """
        return self.evaluation.measure(topK, kappa, auto)

    def finished(self, records: list[Record], inputs: dict[str, str]) -> Finished:
        """Say what a run used and left, for `core.store.remember`.

        Args:
            records: what `run` returned.
            inputs: SHA-256 of what lies outside the output folder, by name.
        """
        root = self.config.output_dir
        paths = [record_path(root, record) for record in records]
        masks = {record["mask_paths"][name]: one for record in records for name, one in record["mask_sha256"].items()}
        return Finished(
            inputs,
            {str(stage.path.relative_to(root)): stage.key for stage in self.stages.setup.kept},
            {str(path.relative_to(root)): sha256_file(path) for path in paths},
            masks,
            understood(self.stages),
        )

    @property
    def config(self) -> PipelineConfig:
        """The configuration as it is run: classes are labels."""
        return self.stages.config

    @property
    def classifier(self) -> HookedModel:
        """The trained classifier, eval mode; as it was before any method changed its copy."""
        return self.stages.classifier

    def _show_results(self, records: list[Record]) -> None:
        """Show new results in trackio: scores of every method and where the answer's mask lies, by kappa, which is the
        step; last, the answer's scores at its chosen point.
        """
        fresh = any(record["provenance"]["started"] == self.evaluation.started for record in records)
        if self.stages.config.tracker is Trackers.trackio and fresh:
            classes = "-".join(map(str, self.config.forget_labels))
            with self.stages.setup.tracker(f"class-{classes}_results") as tracker:
                for record in records:
                    tracker.log(record["kappa"], **self.reporter.scores(record))
                    for layer in record["mask_map"]:
                        name = f"{layer['layer']}, top_k {record['top_k']}, kappa {record['kappa']}"
                        tracker.picture(record["kappa"], name, layer["cells"])
                tracker.log(max(record["kappa"] for record in records), **self.reporter.final(records))
