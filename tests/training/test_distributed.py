"""Training in several processes: equal to one, restarted after a kill, clear about failures, without orphans."""

import copy
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import main
from commands.sweep import expand, load_sweep, run_job
from core.choices import Diverged
from core.config import PipelineConfig, SupportedDatasets, SupportedVisionModels, Trackers, TrainConfig, UserError
from core.observe import Tracker, be_quiet, is_quiet, unheard
from core.yaml_files import load_config
from model import HookedMLPClassifier, HookedResnet
from pipeline import Pipeline
from stages.chain import Stages
from stages.classifier import ClassifierStage
from tests.helpers.common import LOG_LINE, TINY
from tests.helpers.processes import gone, relatives, start, wait_for
from trainer import VisionModelTrainer
from training import distributed
from training.distributed import ALONE, Group, Slices, check_shared_memory, launch, meet
from training.resume import StateFile, recipe
from utils_data import Images, UnlearningDataset, get_unlearning_dataset

ROOT = Path(main.__file__).parent
CPU = torch.device("cpu")
EPOCHS = 3


def digits(batch_size: int, train: Callable[[Images], Images] = lambda images: images) -> UnlearningDataset:
    """DIGITS, its 1,295 training images passed through `train`."""
    data = get_unlearning_dataset(SupportedDatasets.DIGITS, batch_size)
    splits = data.splits | {"train": train(data.splits["train"])}
    return UnlearningDataset(data.name, splits, batch_size, 0, 0)


def trainer(data: UnlearningDataset, state: StateFile | None = None, kind: type = HookedMLPClassifier, **train):
    torch.manual_seed(0)
    config = TrainConfig(**{"epochs": EPOCHS} | train, batch_size=data.batch_size, save_seconds=0)
    return VisionModelTrainer(kind(10, 1, 8), data, config, CPU, Tracker(Trackers.none, "", {}), state)


def difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).detach().abs().max()) for x, y in pairs)


@dataclass(frozen=True)
class Counted(Images):
    """Images that write down how many of them each process reads."""

    folder: Path = Path()

    def batch(self, indices):
        with (self.folder / f"read-{os.getpid()}").open("a") as file:
            file.write(f"{len(indices)}\n")
        return super().batch(indices)


def images_read(folder: Path) -> list[int]:
    """How many images each process read, in the order in which they ended."""
    paths = sorted(folder.glob("read-*"), key=lambda path: path.stat().st_mtime_ns)
    return [sum(map(int, path.read_text().split())) for path in paths]


# --- equal ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "workers"),
    [
        pytest.param(41, 2, id="uneven"),
        pytest.param(647, 2, id="empty share"),
        pytest.param(41, 3, id="three"),
        pytest.param(41, 1, id="one"),
    ],
)
def test_equal_to_one_process(size, workers, tmp_path):
    """1,295 images leave a last batch of 24 or (647) of 1, of which one process gets none."""
    assert 1295 % size == {41: 24, 647: 1}[size]
    data = digits(size)
    one, several = trainer(data), trainer(data, use_ddp=True, num_workers=workers)
    before = copy.deepcopy(several.model)
    expected, found = one.train(tmp_path), several.train(tmp_path)
    assert difference(one.model, several.model) <= 1e-6
    assert difference(before, several.model) > 1e-3
    assert found == {**expected, "val_loss": pytest.approx(expected["val_loss"], rel=1e-6)}
    for a, b in zip(one.tracker.history, several.tracker.history, strict=True):
        assert b.pop("images_per_second", 1) > 0
        a.pop("images_per_second", None)
        assert b == pytest.approx(a, rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


@pytest.mark.slow
def test_batchnorm_in_several_processes(tmp_path):
    """Statistics are of a share, so that weights differ; averaged, they are all processes' own, and training learns."""
    data = digits(16, lambda images: images.only(torch.arange(33)))  # the last batch is one image
    made = trainer(data, kind=HookedResnet, use_ddp=True, num_workers=2)
    figures = made.train(tmp_path)
    losses = [entry["loss"] for entry in made.tracker.history if "loss" in entry]
    assert len(losses) == 9
    assert losses[-2] < 0.7 * losses[0]
    assert math.isfinite(figures["val_loss"])
    means = [value for name, value in made.model.state_dict().items() if name.endswith("running_mean")]
    assert all(float(mean.abs().max()) > 0 for mean in means)


@pytest.mark.slow
def test_batchnorm_of_a_last_batch_of_one(tmp_path):
    """One image has no variance: it is taken as in evaluation, and moves no running statistic."""
    data = digits(16, lambda images: images.only(torch.arange(33)))
    made = trainer(data, kind=HookedResnet)
    batches = list(data.get_train_loader())
    assert [len(labels) for _, labels in batches] == [16, 16, 1]
    made.train(tmp_path)
    losses = [entry["loss"] for entry in made.tracker.history if "loss" in entry]
    assert len(losses) == 9
    assert all(map(math.isfinite, losses))
    counts = [value for name, value in made.model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {2 * EPOCHS}


def enlarged(images: Images) -> Images:
    """A few images of 32 px."""
    few = images.only(torch.arange(24))
    return replace(few, pixels=few.pixels.repeat_interleave(4, 2).repeat_interleave(4, 3))


def curves(folder: Path, **train: Any) -> tuple[list[float], VisionModelTrainer, list[torch.Tensor]]:
    """Losses of a short ResNet training, its trainer, and the inputs of the second convolution in one pass."""
    made = trainer(digits(8, enlarged), kind=HookedResnet, epochs=1, **train)
    seen = []
    hook = made.model.backbone.layer1[0].conv1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    made.train(folder)
    hook.remove()
    return [entry["loss"] for entry in made.tracker.history if "loss" in entry], made, seen


@pytest.mark.slow
def test_bfloat16_and_channels_last_train_the_same(tmp_path):
    """Near what float32 in the usual layout learns; weights stay float32, and the layout is the one asked for."""
    plain, one, dense = curves(tmp_path)
    last, two, strided = curves(tmp_path, channels_last=True)
    half, three, rounded = curves(tmp_path, bf16=True)
    assert last == pytest.approx(plain, rel=1e-2, abs=0.03)
    assert half == pytest.approx(plain, rel=0.1, abs=0.1)
    assert half != plain
    for made in (one, two, three):
        assert {value.dtype for value in made.model.parameters()} == {torch.float32}
    weight = dict(two.model.named_parameters())["backbone.layer1.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    channels_last = [value.is_contiguous(memory_format=torch.channels_last) for value in strided]
    assert all(channels_last)
    assert not any(value.is_contiguous(memory_format=torch.channels_last) for value in dense if value[0, 0].numel() > 1)
    assert {value.dtype for value in rounded if value.requires_grad} == {torch.bfloat16} != {dense[0].dtype}


def test_bfloat16_of_tiny_images_is_refused(tmp_path):
    """A CPU's gradients are garbage there: of some weights, not of all, so that no curve shows it."""
    config = PipelineConfig(
        model_architecture=SupportedVisionModels.HookedResnet,
        train=TrainConfig(bf16=True),
        device="cpu",
        output_dir=tmp_path,
    )
    with pytest.raises(UserError, match=r"train\.bf16 is on for images of 8 px"):
        Stages(config)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_slices_share_out_every_batch(world):
    """Every index exactly once, in as many batches for every rank; an empty share is one image, or is left out."""
    batches = [[7, 1, 5, 2], [0, 3, 4, 6], [8]]
    shares = [list(Slices(batches, rank, world, keep_empty=True)) for rank in range(world)]
    assert {len(share) for share in shares} == {3}
    counts = [[Group(rank, world).share(len(batch)) for batch in batches] for rank in range(world)]
    kept = [[i for part, n in zip(shares[r], counts[r], strict=True) for i in part[:n]] for r in range(world)]
    assert sorted(i for part in kept for i in part) == list(range(9))
    exact = [[i for part in Slices(batches, rank, world, keep_empty=False) for i in part] for rank in range(world)]
    assert exact == kept


@pytest.mark.slow
def test_pipeline_is_shared_out_not_repeated(tmp_path):
    """Each process makes its own images alone: together as many as one process, not twice as many."""
    read = tmp_path / "read"
    read.mkdir()
    trainer(digits(41, lambda images: Counted(**vars(images), folder=read)), use_ddp=True, num_workers=2).train(
        tmp_path
    )
    counts = [sum(map(int, path.read_text().split())) for path in read.iterdir()]
    assert len(counts) == 2
    assert sum(counts) == EPOCHS * 1295


def test_key_of_a_stage():
    """Several processes sum in another order, so that their number counts; how a training is kept does not."""
    plain, two = TrainConfig(), TrainConfig(use_ddp=True, num_workers=2)
    keys = [recipe(config) for config in (plain, two, replace(two, num_workers=3), replace(two, num_workers=1))]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert recipe(replace(two, save_seconds=0, ddp_restarts=9, ddp_timeout=1)) == keys[1]
    assert recipe(replace(plain, lr=0.5)) != keys[0]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_deterministic_algorithms_on_a_gpu_alone(kind, monkeypatch):
    """What a CPU computes does not change; the flags of a GPU can be set without one."""
    flags = torch.backends.cudnn
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(flags, name, name == "benchmark")
    monkeypatch.setattr(flags, "allow_tf32", True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", (asked := []).append)
    try:
        distributed.make_repeatable(torch.device(kind))
        assert torch.are_deterministic_algorithms_enabled() == (kind == "cuda")
        assert torch.is_deterministic_algorithms_warn_only_enabled() == (kind == "cuda")
        assert (flags.benchmark, flags.deterministic) == ((False, True) if kind == "cuda" else (True, False))
        assert (flags.allow_tf32, asked) == ((False, ["highest"]) if kind == "cuda" else (True, []))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def settings(monkeypatch) -> list[object]:
    """What is set for the whole process from now on, in order; nothing is."""
    done: list[object] = []
    monkeypatch.setattr(distributed, "reuse_freed_memory", lambda: done.append("memory"))
    monkeypatch.setattr(distributed, "make_repeatable", done.append)
    return done


def test_no_constructor_sets_anything_for_the_whole_process(tmp_path, monkeypatch):
    done = settings(monkeypatch)
    monkeypatch.setattr("training.processes.reuse_freed_memory", lambda: done.append("memory"))
    pipeline = Pipeline(PipelineConfig(output_dir=tmp_path, device="cpu"))
    assert done == []
    pipeline.prepare_process()
    assert done == ["memory", CPU]


@pytest.mark.parametrize("command", ["run", "train-gcn", "sweep"])
def test_commands_prepare_their_process_before_anything_is_trained(command, tmp_path, monkeypatch, capsys):
    """A sweep's job does it in its own process, whichever engine started that."""
    done = settings(monkeypatch)

    def trains(_) -> Path:
        raise UserError(f"trained after {done}")

    monkeypatch.setattr(ClassifierStage, "train", trains)
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    if command == "sweep":
        file.write_text(f"{TINY}output_dir: {tmp_path}\nsweep: {{over: {{seed: [0]}}}}\n")
        (job,) = expand(*load_sweep([file]))
        assert run_job(job)["error"] == f"UserError: trained after ['memory', {CPU!r}]"
    else:
        out = ["--out", str(tmp_path / "g.safetensors")] if command == "train-gcn" else []
        assert main.main([command, "--config", str(file), "--output-dir", str(tmp_path), *out]) == 2
        assert f"error: trained after ['memory', {CPU!r}]" in capsys.readouterr().err


# --- robust -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fatal(Counted):
    """Images whose 40th batch in a process (mid-epoch 2) does something, as often as there are tickets."""

    then: str = ""

    def batch(self, indices):
        calls[0] += 1
        if calls[0] == 40:
            for ticket in self.folder.glob("ticket-*"):
                try:
                    ticket.rename(self.folder / f"used-{ticket.name}")
                except FileNotFoundError:  # the other process was faster
                    continue
                if self.then == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.then == "kill the fork server":
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(60)
                raise ValueError("this image\nis broken")
        return super().batch(indices)


calls = [0]


def fatal(folder: Path, then: str, tickets: int) -> UnlearningDataset:
    for number in range(tickets):
        (folder / f"ticket-{number}").touch()
    return digits(41, lambda images: Fatal(**vars(images), folder=folder, then=then))


@pytest.mark.slow
def test_killed_worker_starts_again(tmp_path, capfd):
    """From the state after epoch 1, with the result of a training that nobody stops."""
    several = trainer(fatal(tmp_path, "kill", 1), use_ddp=True, num_workers=2)
    whole = trainer(digits(41), use_ddp=True, num_workers=2)
    assert several.train(tmp_path) == whole.train(tmp_path)
    assert difference(several.model, whole.model) == 0
    assert [entry.get("loss") for entry in several.tracker.history] == [
        entry.get("loss") for entry in whole.tracker.history
    ]
    assert (tmp_path / "used-ticket-0").exists()
    err = capfd.readouterr().err
    assert re.search(r"worker \d of 2 died \(SIGKILL\): all start again from the last state", err)
    assert "Traceback" not in err
    assert sum(images_read(tmp_path)[2:]) == 2 * 1295, "epochs 2 and 3, not the first again"


@pytest.mark.slow
def test_killed_fork_server(tmp_path, capfd):
    """Its workers end with it, the cause is told, and all start again from the last state."""
    several = trainer(fatal(tmp_path, "kill the fork server", 1), use_ddp=True, num_workers=2)
    whole = trainer(digits(41), use_ddp=True, num_workers=2)
    begun = time.monotonic()
    assert several.train(tmp_path) == whole.train(tmp_path)
    assert time.monotonic() - begun < 60, "nobody waits for the worker that sleeps"
    assert difference(several.model, whole.model) == 0
    err = capfd.readouterr().err
    said = r"the process that starts the workers died \(.+\): all start again from the last state"
    assert len(re.findall(said, err)) == 1
    assert "Traceback" not in err
    with pytest.raises(RuntimeError, match=r"^the process that starts the workers died \(killed, or out of memory\)$"):
        trainer(fatal(tmp_path, "kill the fork server", 1), use_ddp=True, num_workers=2, ddp_restarts=0).train(tmp_path)


@pytest.mark.slow
def test_worker_that_dies_again_and_again(tmp_path, capfd):
    """`ddp_restarts` is how often they start again."""
    with pytest.raises(RuntimeError, match=r"^worker \d failed: Signal 9 \(SIGKILL\) received by PID \d+$"):
        trainer(fatal(tmp_path, "kill", 5), use_ddp=True, num_workers=2, ddp_restarts=1).train(tmp_path)
    assert capfd.readouterr().err.count("all start again") == 1


@pytest.mark.slow
def test_exception_of_a_worker_is_one_line(tmp_path, capfd):
    """And is not tried again: it would come again."""
    with pytest.raises(RuntimeError, match=r"^worker \d failed: ValueError: this image is broken$"):
        trainer(fatal(tmp_path, "raise", 1), use_ddp=True, num_workers=2).train(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_user_error_of_a_worker_stays_one(tmp_path):
    with pytest.raises(UserError, match=r"^the classifier's loss is no longer finite: lower train\.lr$"):
        trainer(digits(41), use_ddp=True, num_workers=2, lr=1e30).train(tmp_path)


def one_bad_image(images: Images) -> Images:
    """The last image is no picture: the process that gets it, and it alone, has a loss that is not finite."""
    pixels = images.pixels.float()
    pixels[-1] = math.nan
    return replace(images, pixels=pixels)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path, capfd):
    """At once, with the reason: nobody waits for an exchange that never comes, and nothing starts again."""
    begun = time.monotonic()
    with pytest.raises(Diverged, match=r"^the classifier's loss is no longer finite: lower train\.lr$"):
        trainer(digits(41, one_bad_image), use_ddp=True, num_workers=2, ddp_timeout=300).train(tmp_path)
    assert time.monotonic() - begun < 100
    assert capfd.readouterr().err == ""


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def place(monkeypatch, rank: int, world: int, address: str, port: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": address, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["interface", "busy port", "no master", "nobody comes"])
def test_processes_that_do_not_meet(case, monkeypatch):
    """One clear sentence, within seconds."""
    with socket.create_server(("localhost", 0)) as busy:
        if case == "interface":
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
        port = busy.getsockname()[1] if case == "busy port" else free_port()
        place(monkeypatch, *{"no master": (1, 2), "nobody comes": (0, 2)}.get(case, (0, 1)), "localhost", port)
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"do not find each other \(.+\): check the master's address and port"):
            meet(CPU, 2, join_seconds=2)
    distributed.leave_group()
    assert time.monotonic() - begun < 20


def test_meeting_alone(monkeypatch):
    """The same place, with nothing in the way, is a group of one."""
    place(monkeypatch, 0, 1, "localhost", free_port())
    try:
        assert meet(CPU, 2, join_seconds=2).group == ALONE
    finally:
        distributed.leave_group()


def stall(group: Group, device: torch.device) -> dict:
    """Rank 1 does not come to the exchange."""
    if group.leads:
        group.barrier()
    else:
        time.sleep(60)
    return {}


@pytest.mark.slow
def test_stuck_worker_ends_in_an_error(monkeypatch):
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^worker 0 failed: .*[Tt]im"):
        launch(stall, (), workers=2, device=CPU, seconds=3, restarts=3)
    assert time.monotonic() - begun < 40


def test_images_must_fit_shared_memory(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255)))
    with pytest.raises(UserError, match="take 1 MB of shared memory, /dev/shm has 0 MB free: enlarge it"):
        check_shared_memory(digits(41).splits.values())


@pytest.mark.slow
def test_handlers_stay_as_they_were(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert launch(nothing, (), workers=1, device=CPU, seconds=30, restarts=0) == {"rank": 0, "threads": 1}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def nothing(group: Group, device: torch.device) -> dict:
    return {"rank": group.rank, "threads": torch.get_num_threads()}


# --- whole programs ---------------------------------------------------------------------------------------


STOPS = {"Ctrl-C": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143), "kill -9": (signal.SIGKILL, -9)}


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_no_orphan_and_no_torn_file(stop, tmp_path):
    """Ctrl-C reaches every process of the terminal, the others the first one alone."""
    number, code = STOPS[stop]
    words = ["main.py", "run", "--config", tmp_path / "tiny.yaml", "--output-dir", tmp_path / "out"]
    words += ["--train.use-ddp", "--train.num-workers", 2, "--train.epochs", 10**6, "--train.save-seconds", 0]
    process = start(tmp_path, *words)
    try:
        wait_for("classifier: epoch", tmp_path, process)
        end = time.monotonic() + 20  # the state is saved after the line is said
        while not list(tmp_path.glob("out/checkpoints/resume/*.safetensors")) and time.monotonic() < end:
            time.sleep(0.01)
        assert len(relatives(str(tmp_path))) >= 4
        (os.killpg if stop == "Ctrl-C" else os.kill)(process.pid, number)
        assert process.wait(40) == code
        assert gone(str(tmp_path)), (tmp_path / "log").read_text()
    finally:
        for pid in relatives(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    if stop == "Ctrl-C":
        assert text.splitlines()[-1].startswith("interrupted: ")
    assert stop == "kill -9" or not list(tmp_path.rglob("*.part"))
    (state,) = (tmp_path / "out/checkpoints/resume").glob("*.safetensors")
    assert "linears.0.weight" in {name.removeprefix("model.") for name in load_file(state)}


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.5, 2.0])
def test_launcher_killed_while_workers_start(delay, tmp_path):
    """They wait for each other for a minute, but not for a launcher that is gone."""
    words = ["main.py", "run", "--config", tmp_path / "tiny.yaml", "--output-dir", tmp_path / "out"]
    process = start(tmp_path, *words, "--train.use-ddp", "--train.num-workers", 2, "--train.epochs", 10**6)
    try:
        end = time.monotonic() + 120
        while len(relatives(str(tmp_path))) < 4:  # the launcher, its fork server and helper, one worker
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
        time.sleep(delay)
        process.kill()
        process.wait()
        assert gone(str(tmp_path), 10), (tmp_path / "log").read_text()
    finally:
        for pid in relatives(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_does_not_train_again_what_diverged(tmp_path):
    """It starts again whatever ended with an error: then the same is said at once, without another epoch."""
    run = ["main.py", "run", "--config", tmp_path / "tiny.yaml", "--output-dir", tmp_path / "out", "--train.use-ddp"]
    agent = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1, "--standalone"]
    node = start(tmp_path, *agent, *run, "--train.lr", "1e30")
    try:
        code = node.wait(200)
    finally:
        for pid in relatives(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert code != 0
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert lines[0] == "error: the classifier's loss is no longer finite: lower train.lr"
    assert len(lines) == 2, text
    assert "it ended so before" in lines[1]


@pytest.mark.slow
def test_two_nodes_by_torchrun(tmp_path):
    """Two agents, as on two machines: one result, that of one process; the second node writes nothing."""
    endpoint = f"localhost:{free_port()}"
    run = ["main.py", "run", "--config", tmp_path / "tiny.yaml", "--output-dir", tmp_path / "out", "--train.use-ddp"]
    run += ["--eval.methods", "retrain", "default", "--eval.references", "1"]
    agent = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
    agent += ["--rdzv-endpoint", endpoint, "--rdzv-id", "test", "--local-addr", "localhost"]
    nodes = [start(tmp_path, *agent, *run) for _ in range(2)]
    try:
        codes = [node.wait(150) for node in nodes]
    finally:
        for pid in relatives(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert codes == [0, 0], text
    assert text.count("JSON   ") == 1
    config = load_config([tmp_path / "tiny.yaml"])
    alone = Stages(replace(config, output_dir=tmp_path / "one"))
    alone.run_vision_model_training()
    alone.retrained()
    for kind in ("classifier", "retrained"):
        (path,) = (tmp_path / "out/checkpoints" / kind).glob("*/classifier.safetensors")
        (other,) = (tmp_path / "one/checkpoints" / kind).glob("*/classifier.safetensors")
        a, b = load_file(path), load_file(other)
        assert max(float((a[name] - b[name]).abs().max()) for name in b) <= 1e-6


def test_torchrun_without_ddp_is_refused(tmp_path, monkeypatch, capsys):
    """Else every process would do the whole run, in one folder."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main.main(["run", "--output-dir", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not LOG_LINE.match(line)]
    assert "train.use_ddp is off: add --train.use-ddp" in line
    assert list(tmp_path.iterdir()) == []


def told(group: Group, device: torch.device) -> dict:
    """Whether progress goes unsaid in a worker."""
    return {"quiet": is_quiet()}


def test_workers_of_a_quiet_run_are_quiet():
    be_quiet(False)
    with unheard():
        assert launch(told, (), workers=1, device=CPU, seconds=30, restarts=0) == {"quiet": True}
    assert launch(told, (), workers=1, device=CPU, seconds=30, restarts=0) == {"quiet": False}
