"""The demo: answers over HTTP against a run's own record, what is refused, and the page in a browser."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
import torch

from core.choices import UserError
from core.config import PROJECT_ROOT, EvalConfig, PipelineConfig, SupportedVisionModels, TrainConfig
from main import main
from pipeline import Pipeline
from showing.answers import Answers, for_demo
from showing.server import Refused, Server, asked
from tests.helpers.browser import FLAGS, NOWHERE, find_browser

LABEL, KAPPA = 3, 100
BUSY = "another page may not ask this"


@dataclass(frozen=True)
class Running:
    """A server that answers, and the settings that it was started with."""

    server: Server
    config: PipelineConfig

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, http.client.HTTPResponse]:
        """(status, what the JSON says or the text, reply)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        is_json = reply.headers["Content-Type"] == "application/json"
        return reply.status, json.loads(text) if is_json else text, reply


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Running]:
    config = PipelineConfig(
        output_dir=tmp_path_factory.mktemp("demo"), device="cpu", kappa_list=(50, KAPPA), train=TrainConfig(epochs=3)
    )
    with Server(0, Answers(config)) as server:
        server.prepare()
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield Running(server, config)
        server.shutdown()
        thread.join()


# --- what it answers --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_are_those_of_a_run(demo):
    """The oracle: a whole run of its own with the same settings, and the mask file that it leaves."""
    status, said, _ = demo.get(f"/forget?class={LABEL}&kappa={KAPPA}")
    network = PROJECT_ROOT / "pretrained/gcn_mlp.safetensors"
    judged = EvalConfig(methods=("mimu", "default"), metrics=("core",), references=0)
    run = Pipeline(replace(demo.config, forget_class=(LABEL,), gcn_path=network, kappa_list=(KAPPA,), eval=judged))
    (record,) = run.measure()
    methods = record["methods"]
    assert status == 200
    assert {name: methods["mimu"][name] for name in said["after"]} == said["after"]
    assert {name: methods["default"][name] for name in said["before"]} == said["before"]
    assert set(said["after"]) == {"forget_score", "retain_score"}
    assert said["changed"] == methods["mimu"]["weights_changed"] == KAPPA
    assert 0 < said["seconds"] < 30
    forgotten = said["samples"]["forgotten"]
    assert [one["image"] for one in forgotten] == record["samples"]["images"]
    assert [one["after"] for one in forgotten] == record["said_of_samples"]["mimu"]
    assert [one["before"] for one in forgotten] == record["said_of_samples"]["default"]
    assert {one["label"] for one in forgotten} == {LABEL}


@pytest.mark.slow
def test_predictions_on_other_images_are_the_masked_networks(demo):
    """The mask of `Eval`'s own context, multiplied into the weights of a copy by hand."""
    answers = demo.server.answers
    said = answers.forget(LABEL, KAPPA)["samples"]["others"]
    found = answers._eval(LABEL)
    mask = found.masks(answers._point(KAPPA))["mimu"]
    model = answers.pipeline.stages.classifier
    part = found.context.data.splits["test"]
    kept = (~found.context.data.is_forgotten(part.labels)).nonzero().flatten()
    images, labels = part.batch(kept)
    weights = [weight.detach() * mask.keep.view_as(weight) for weight in model.weights(-2)]
    with torch.inference_mode():
        p = model.head(model.prefix(images, -2), -2, weights).softmax(1)
    shown = {int(one["label"]): one["after"] for one in said}
    assert len(said) == 8
    assert LABEL not in shown
    for label, (predicted, probability) in shown.items():
        of_class = p[labels == label]
        assert any(
            int(row.argmax()) == predicted and float(row.max()) == pytest.approx(probability, abs=1e-4)
            for row in of_class
        )


@pytest.mark.slow
def test_a_lifted_mask_leaves_no_trace(demo):
    before = demo.get(f"/forget?class={LABEL}&kappa={KAPPA}")[1]
    status, said, _ = demo.get(f"/lift?class={LABEL}&kappa={KAPPA}")
    assert (status, said["identical"]) == (200, True)
    assert said["sha256"]["before"] == said["sha256"]["lifted"] != said["sha256"]["masked"]
    assert said["after"] == before["before"]
    for side in ("forgotten", "others"):
        assert [one["after"] for one in said["samples"][side]] == [one["before"] for one in before["samples"][side]]


@pytest.mark.slow
def test_answers_do_not_depend_on_who_asks_at_the_same_time(demo):
    paths = [f"/forget?class={label}&kappa={kappa}" for label in (0, 1, 2) for kappa in (20, 400)]
    alone = {path: demo.get(path)[1] for path in paths}
    together: dict[str, Any] = {}

    def fetch(path: str) -> None:
        together[path] = demo.get(path)[1]

    threads = [threading.Thread(target=fetch, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.slow
def test_a_classifier_at_chance_is_named(demo, tmp_path):
    """One step of training with a tiny rate leaves the first weights nearly as they were drawn."""
    assert "Warning" not in demo.server.page
    guessing = TrainConfig(epochs=1, lr=1e-9, batch_size=1295)
    answers = Answers(PipelineConfig(output_dir=tmp_path, device="cpu", train=guessing))
    with Server(0, answers) as server:
        server.prepare()
        assert "Warning: the untouched classifier recognises " in server.page
        assert "near chance" in server.page


def test_the_network_that_ships_is_used_unless_one_is_given():
    config = PipelineConfig(tracker="trackio")
    assert for_demo(config).gcn_path == PROJECT_ROOT / "pretrained/gcn_mlp.safetensors"
    resnet = replace(config, model_architecture=SupportedVisionModels.HookedResnet)
    assert for_demo(resnet).gcn_path == PROJECT_ROOT / "pretrained/gcn_resnet.safetensors"
    assert for_demo(replace(config, gcn_path=Path("mine"))).gcn_path == Path("mine")
    assert all(for_demo(one).gcn_path.is_file() for one in (config, resnet))


# --- what it refuses --------------------------------------------------------------------------------------

WRONG = [
    *("", "class=3", "kappa=100", "class=3&kappa=", "class=3&kappa=1e2", "class=-1&kappa=1", "class=3&kappa=1&x=2"),
    *("class=3&class=3", "class=3&kappa=1&kappa=2", "class=%D9%A3&kappa=3", "class=3%00&kappa=1", "class=3;kappa=1"),
    "class=1234567890&kappa=1",
]


@pytest.mark.parametrize("query", WRONG)
def test_a_question_is_read_word_by_word(query):
    with pytest.raises(Refused, match="ask for a class and a number of weights") as error:
        asked(query)
    assert error.value.status == 400


def test_a_good_question_is_read():
    assert asked("class=3&kappa=100") == asked("kappa=100&class=3") == (3, 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "headers", "status", "why"),
    [
        ("/forget?class=10&kappa=5", {}, 400, "there is no class 10: choose from 0 to 9"),
        ("/forget?class=1&kappa=0", {}, 400, "kappa is 0"),
        ("/lift?class=1&kappa=8193", {}, 400, "kappa is 8193, but the masked layers have 8192 weights"),
        ("/forget?class=x&kappa=5", {}, 400, "ask for a class"),
        ("/nothing", {}, 404, "there is nothing at this address"),
        ("/../main.py", {}, 404, "there is nothing at this address"),
        ("/?x", {}, 404, "there is nothing at this address"),
        ("/" + 300 * "a", {}, 414, "301 characters"),
        ("/", {"Host": "evil.example"}, 403, "this page is for http://127.0.0.1"),
        ("/", {"Host": "127.0.0.1"}, 403, "this page is for http://127.0.0.1"),
        ("/forget?class=1&kappa=5", {"Origin": "http://evil.example"}, 403, BUSY),
        ("/forget?class=1&kappa=5", {"Sec_Fetch_Site": "cross-site"}, 403, BUSY),
        ("/lift?class=1&kappa=5", {"Sec_Fetch_Site": "same-site"}, 403, BUSY),
    ],
)
def test_refusals(demo, path, headers, status, why):
    found, said, reply = demo.get(path, **headers)
    assert found == status
    assert why in said["error"]
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]


@pytest.mark.slow
def test_the_page_is_for_this_machine_alone(demo):
    assert demo.server.socket.getsockname()[0] == "127.0.0.1"
    status, html, reply = demo.get("/", Host=f"localhost:{demo.server.port}")
    assert status == 200
    assert demo.get("/", method="POST")[0] == 501
    (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", reply.headers["Content-Security-Policy"]))
    assert re.findall(r"<(?:script|style) nonce=\"([^\"]*)\"", html) == [nonce, nonce]
    assert set(re.findall(r"https?://[^\s\"'<>`]+", html)) <= {"http://www.w3.org/2000/svg"}


def test_ports_that_cannot_be_had(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port, why in (
            (taken.getsockname()[1], "cannot be had (Address already in use): give another with --port"),
            (70_000, "port is 70000: give one from 1 to 65535, or 0 for any that is free"),
            (-1, "port is -1: give one from 1 to 65535"),
        ):
            assert main(["demo", "--port", str(port), "--output-dir", str(tmp_path)]) == 2
            assert why in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()  # said before anything is trained
    with pytest.raises(UserError, match="port"):
        Server(65_536, SimpleNamespace())


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(tmp_path):
    words = ["demo", "--port", "0", "--output-dir", str(tmp_path), "--train.epochs", "1", "--device", "cpu", "--quiet"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": PROJECT_ROOT}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may ignore it
    with subprocess.Popen([sys.executable, "main.py", *words], preexec_fn=heard, **pipes) as process:
        try:
            found = re.fullmatch(r"open (http://127\.0\.0\.1:\d+/) in a browser.*\n", process.stdout.readline())
            assert found
            with urlopen(found[1], timeout=60) as reply:
                assert "Forget a class, and lift it again" in reply.read().decode()
            process.send_signal(signal.SIGINT)
            assert (process.wait(60), process.stderr.read()) == (0, "")
        finally:
            process.kill()
    assert list(tmp_path.glob("checkpoints/classifier/*/classifier.safetensors"))
    assert not list(tmp_path.glob("eval/**/*.json"))  # what is shown is no record


# --- in a browser -----------------------------------------------------------------------------------------

PROBE = Path(__file__).with_name("demo_probe.js").read_text(encoding="utf-8")
HERE_ALONE = f"{NOWHERE}, EXCLUDE 127.0.0.1"


@pytest.mark.slow
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 500)], ids=["light and wide", "dark and narrow"])
def test_page_in_a_browser(demo, tmp_path, monkeypatch, dark, width):
    browser, server = find_browser(), demo.server
    script = f'<script nonce="{server.nonce}">{PROBE}</script>'
    monkeypatch.setattr(server, "page", server.page.replace("</body>", script + "</body>"))
    flags = [*FLAGS, HERE_ALONE, f"--window-size={width},1200", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    flags += ["--virtual-time-budget=20000", "--dump-dom", server.address]
    done = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:] + done.stdout[-2000:]
    seen = SimpleNamespace(**json.loads(unescape(found[1])))
    said = demo.get(f"/forget?class={LABEL}&kappa={KAPPA}")[1]
    after, before = (f"{said[when]['forget_score']:.1f}\xa0%" for when in ("after", "before"))
    assert seen.errors == []
    assert f"With {KAPPA} weights switched off, class 0 (zero) is recognised" in seen.first
    assert seen.forgotten == (
        f"With {KAPPA} weights switched off, class 3 (three) is recognised {after} of the time (before: {before})."
    )
    assert seen.costs[:3] == [after, f"{said['after']['retain_score']:.1f}\xa0%", str(KAPPA)]
    assert re.fullmatch(r"\d+ ms", seen.costs[3])
    assert len(seen.alts) == seen.others == 8
    assert all(alt.startswith("test image of class 3 (three), before taken for ") for alt in seen.alts)
    assert seen.kappa.startswith("16 of 8,192")
    assert seen.lifted == f"The mask is off: class 3 (three) is recognised {before} of the time, as before."
    assert (seen.identical, seen.off) == ("identical", True)
    assert re.fullmatch(r"SHA-256 of the weights: before (\w{12}), with the mask (?!\1)\w{12}, lifted \1\.", seen.bits)
    assert (seen.unlabelled, seen.overflow) == (0, 0)
