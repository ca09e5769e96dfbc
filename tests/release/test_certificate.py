"""A certificate from the command line: written from the artefact, held against it, and refused. The oracles are the
mask's own files read as JSON, hashlib, and a browser.
"""

import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import main
from core.config import UserError
from mimu import Mask
from release import paper
from release.facts import facts_of
from release.pages import as_html, as_markdown
from release.paper import HEIGHT, LEAST, MARGIN, WIDTH, as_pdf, drawable, set_to_fit, width_of, wrapped
from release.sheet import Sheet, certificate, forgotten, model_card
from tests.helpers.browser import FLAGS, NOWHERE, find_browser
from tests.helpers.foreign import mask_on, mlp
from tests.helpers.patterns import NAMES, spec_of, trained, words_for, write_folder
from tests.release.test_facts import SCORES

FILES = {"certificate.json", "certificate.html", "certificate.pdf", "MODEL_CARD.md"}
PAGES = re.compile(rb"/Type /Page\b")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with net.py, net.pt, photos, mask (of the class dots), and mask-certificate."""
    root = tmp_path_factory.mktemp("home")
    trained(root)
    write_folder(root / "photos", 60)
    words = ["forget", *words_for(root), "--class", "dots", "--kappa", "600", "--out", str(root / "mask")]
    assert main.main(words) == 0
    assert main.main(["certificate", spec_of(root), str(root / "mask")]) == 0
    return root


@pytest.fixture
def copy(home, tmp_path) -> Path:
    """The mask and its certificate in a folder that a test may spoil."""
    for name in ("mask", "mask-certificate"):
        shutil.copytree(home / name, tmp_path / name)
    return tmp_path


def verify(home: Path, place: Path, *more: object) -> int:
    return main.main(["verify", spec_of(home), str(place / "mask"), *map(str, more), "--quiet"])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def resealed(facts: dict) -> str:
    """JSON with a digest that is right, made by hand."""
    plain = {key: value for key, value in facts.items() if key != "digest"}
    return json.dumps(plain | {"digest": sha256(json.dumps(plain, sort_keys=True).encode())})


# --- what is written --------------------------------------------------------------------------------------


def test_a_certificate_says_what_the_masks_files_say(home):
    place = home / "mask-certificate"
    assert {path.name for path in place.iterdir()} == FILES
    facts = json.loads((place / "certificate.json").read_text())
    card = json.loads((home / "mask/mask_config.json").read_text())
    assert facts["mask"]["file_sha256"] == sha256((home / "mask/mask.safetensors").read_bytes())
    assert facts["mask"]["digest"] == card["digest"]
    assert facts["parent"]["state_sha256"] == card["parent"]["state_sha256"]
    assert facts["images"]["sha256"] == card["data_sha256"]
    assert facts["forgets"] == [{"index": 2, "name": "dots"}] == card["forgotten"]
    for one in facts["measured"]:
        assert one["value"] == card["scores"][one["name"]]
        assert one["images"] == card["scores"]["n"][one["name"]]
        assert [one["low"], one["high"]] == card["scores"]["intervals"].get(one["name"], [None, None])
    (word,) = facts["word"]
    assert word["key"] == "suppressed"
    promised = facts.pop("digest")
    assert promised == sha256(json.dumps(facts, sort_keys=True).encode())
    shown = (place / "certificate.html").read_text(), (place / "MODEL_CARD.md").read_text()
    for text in shown:
        for value in (promised, facts["mask"]["digest"], facts["mask"]["file_sha256"], card["parent"]["state_sha256"]):
            assert value in text
        assert "suppressed" in text
    assert not re.search(r"https?:|src=|<script|<link|@import|url\(", shown[0])


def test_the_same_mask_has_the_same_certificate_to_the_byte(home, tmp_path):
    assert main.main(["certificate", spec_of(home), str(home / "mask"), "--out", str(tmp_path / "again")]) == 0
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (home / "mask-certificate" / name).read_bytes()
    file = str(home / "mask/mask.safetensors")  # named by its file, a mask is the same
    assert main.main(["certificate", spec_of(home), file, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/certificate.json").read_bytes() == (
        home / "mask-certificate/certificate.json"
    ).read_bytes()


def test_a_certificate_names_the_command_that_verifies_it(home, capsys):
    facts = json.loads((home / "mask-certificate/certificate.json").read_text())
    *words, images = (one["command"].split() for one in facts["verify"][1:])
    for line in (*words, images):
        line = [{"MASK": str(home / "mask"), "IMAGES": str(home / "photos")}.get(word, word) for word in line]
        line[line.index("certificate.json")] = str(home / "mask-certificate/certificate.json")
        assert line[:3] == ["uv", "run", "main.py"]
        capsys.readouterr()
        assert main.main([*line[3:], "--quiet"]) == 0
        assert "says what the mask and its card say" in capsys.readouterr().out


# --- what is refused --------------------------------------------------------------------------------------


def other(home: Path, place: Path, parameter: str) -> str:
    """A file in which one number of a parameter or buffer is another, as the command line names the model."""
    state = torch.load(home / "net.pt", weights_only=True)
    state[parameter].view(-1)[0] += 1
    torch.save(state, place / "other.pt")
    return f"py:{home}/net.py:net@{place}/other.pt"


@pytest.mark.parametrize(("parameter", "message"), [
    ("conv2.weight", "is not the mask's parent"),
    ("bn1.running_mean", "is not the mask's very parent"),
])  # fmt: skip
def test_another_model_gets_no_certificate(home, tmp_path, capsys, parameter, message):
    spec = other(home, tmp_path, parameter)
    assert main.main(["certificate", spec, str(home / "mask"), "--out", str(tmp_path / "c")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_nothing_else_is_overwritten(home, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/theirs").write_text("theirs")
    for place in (tmp_path / "c", tmp_path / "c/theirs", home / "mask"):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main.main(["certificate", spec_of(home), str(home / "mask"), "--out", str(place)]) == 2
        assert "choose" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_mask_that_does_not_hold_gets_none(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Mask, "differing", lambda *_: (1, 0))
    assert main.main(["certificate", spec_of(home), str(home / "mask"), "--out", str(tmp_path / "c")]) == 2
    assert "nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


# --- held against the mask --------------------------------------------------------------------------------


def test_verify_finds_the_certificate_beside_the_mask(home, copy, capsys):
    assert verify(home, copy) == 0
    assert f"{copy}/mask-certificate/certificate.json is as it was written" in capsys.readouterr().out
    (copy / "mask-certificate").rename(copy / "elsewhere")
    assert verify(home, copy) == 0
    assert "certificate" not in capsys.readouterr().out
    for named in (copy / "elsewhere", copy / "elsewhere/certificate.json"):
        assert verify(home, copy, "--certificate", named) == 0
        assert "says what the mask and its card say" in capsys.readouterr().out
    assert verify(home, copy, "--certificate", copy / "gone.json") == 2


def test_a_change_is_seen_by_the_digest(home, copy, capsys):
    path = copy / "mask-certificate/certificate.json"
    path.write_text(path.read_text().replace('"suppressed"', '"erased"'))
    assert verify(home, copy) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [
    ("mask/mask.safetensors", "the mask is damaged|mask.safetensors is damaged"),
    ("mask/mask_config.json", "mask_config.json (is damaged|does not say what)"),
    ("net.pt", "the model is not, to the bit, the parent that it names|not the mask's parent"),
    ("mask-certificate/certificate.json", r"certificate\.json is damaged"),
    ("mask-certificate/certificate.html", r"certificate\.html is not the page"),
    ("mask-certificate/MODEL_CARD.md", r"MODEL_CARD\.md is not the page"),
])  # fmt: skip
def test_taken_elsewhere_it_holds_until_one_byte_changes(home, copy, capsys, name, message):
    for one in ("net.py", "net.pt"):
        shutil.copy(home / one, copy / one)
    assert verify(copy, copy) == 0
    data = bytearray((copy / name).read_bytes())
    data[len(data) * 55 // 100] ^= 1
    (copy / name).write_bytes(data)
    capsys.readouterr()
    assert verify(copy, copy) in (1, 2)
    said = capsys.readouterr()
    assert len(re.findall(message, said.out + said.err)) == 1, said


@pytest.mark.parametrize(("change", "message"), [
    (lambda facts: facts["measured"][0].update(value=12.0), "measured.0.value"),
    (lambda facts: facts["word"][0].update(key="erased"), "word.0.key"),
    (lambda facts: facts["not_checked"].pop(), "not_checked"),
    (lambda facts: facts["parent"].update(state_sha256="0" * 64), "parent.state_sha256"),
    (lambda facts: facts["mask"].update(file_sha256="0" * 64), "mask.file_sha256"),
    (lambda facts: facts["mask"].update(digest="0" * 64), "of another mask"),
    (lambda facts: facts.update(mask=None), "of another mask"),
    (lambda facts: facts.update(more=1), "more"),
])  # fmt: skip
def test_a_change_with_a_new_digest_is_seen_by_the_mask(home, copy, capsys, change, message):
    path = copy / "mask-certificate/certificate.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(resealed(facts))
    assert verify(home, copy) == 1
    said = capsys.readouterr().out
    assert "does NOT hold" in said
    assert message in said


@pytest.mark.parametrize(("change", "message"), [
    ({"version": 2}, "of version 2, this MIMU reads 1"),
    ({"format": "mimu-mask"}, "is no certificate"),
])  # fmt: skip
def test_another_file_is_no_certificate(home, copy, capsys, change, message):
    path = copy / "mask-certificate/certificate.json"
    path.write_text(resealed(json.loads(path.read_text()) | change))
    assert verify(home, copy) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["certificate.html", "MODEL_CARD.md"])
def test_the_page_that_people_read_is_held_against_the_json(home, copy, capsys, name):
    path = copy / "mask-certificate" / name
    path.write_text(path.read_text().replace("suppressed", "erased"))
    assert verify(home, copy) == 1
    assert f"{name} is not the page of this certificate" in capsys.readouterr().out
    path.unlink()
    assert verify(home, copy) == 0


def test_a_certificate_does_not_hold_for_another_model(home, copy, capsys):
    spec = other(home, copy, "bn1.running_mean")
    assert main.main(["verify", spec, str(copy / "mask"), "--quiet"]) == 1
    assert "the model is not, to the bit, the parent that it names" in capsys.readouterr().out


def test_scores_are_measured_again_and_other_scores_are_told(home, copy, capsys):
    words = words_for(home, copy / "mask")
    assert main.main(["verify", *words]) == 0
    assert re.search(r"forget: (\d\.\d\d) % of 18 test images, the card says \1 %", capsys.readouterr().out)
    one = Mask.load(copy / "mask")
    Mask(one.positions, one.config.plain() | {"scores": {**one.config.scores, "forget": 50.0}}).save(copy / "mask")
    assert main.main(["certificate", spec_of(home), str(copy / "mask")]) == 0  # a card may lie, and so does this then
    assert main.main(["verify", *words]) == 1
    said = capsys.readouterr().out
    assert "NOT the same" in said
    assert "says what the mask and its card say" in said


# --- the pages --------------------------------------------------------------------------------------------

HARD = "<b>\u4e2d\x1b[1m$x^2$ | `a`</b>\u202e"


METHOD = (
    "robust, kappa auto: the one tried that comes nearest to, without meeting it, forget <= 2 % and loss <= 1 points "
    "with 95 % confidence, with the model's BatchNorm statistics and with new ones, on validation images"
)  # the longest that forget writes


def sheets(name: str, count: int = 1, parameters: int = 1, **more: object) -> tuple[Sheet, Sheet]:
    """Certificate and model card of a mask on a small model, with classes of this name."""
    net = mlp()
    classes = [{"index": number, "name": name} for number in range(count)]
    made = mask_on(net, ["2.weight", "0.weight"][:parameters], classes=classes)
    facts = facts_of(
        Mask(made.positions, made.config.plain() | {"scores": {**SCORES, **more}, "method": METHOD}), "0" * 64
    )
    return certificate(facts, "f" * 64), model_card(facts, "f" * 64)


def texts(html: str) -> str:
    return re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def test_how_weights_were_found_is_said_to_its_end():
    sheet, card = sheets("dots")
    assert METHOD in html.unescape(texts(as_html(sheet, "x")))
    assert METHOD in as_markdown(card).replace("\\", "")


def test_names_from_others_are_shown_and_never_obeyed():
    sheet, card = sheets(HARD)
    page, markdown = texts(as_html(sheet, "x")), as_markdown(card)
    for text in (page, markdown):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\\x1b" in text
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert r"\<b>" in markdown
    assert r"\`a\`" in markdown
    assert as_pdf(sheet).startswith(b"%PDF")


def boxes_of(sheet: Sheet) -> list[tuple[float, float, float, float]]:
    """(left, bottom, right, top) of the outlines of every text that is drawn, in points."""
    from matplotlib.textpath import TextPath

    boxes = []
    for text in paper.draw(sheet).texts:
        outline = TextPath((0, 0), text.get_text(), text.get_fontsize(), prop=text.get_fontproperties(), usetex=False)
        if not len(outline.vertices):
            continue
        box, (x, y) = outline.get_extents(), text.get_position()
        x = x * WIDTH - (box.x1 if text.get_ha() == "right" else 0)
        boxes.append((x + box.x0, y * HEIGHT + box.y0, x + box.x1, y * HEIGHT + box.y1))
    return boxes


FULL = {f"features_{name}": ", ".join(f"layer{n}.{n} {n}" for n in range(9)) for name in ("before", "may", "now")}


@pytest.mark.parametrize(("name", "count", "more"), [
    ("dots", 1, {}),
    ("dots", 1, FULL),
    (HARD, 3, FULL),
    ("W" * 500, 12, FULL),
    ("a cat " * 80, 40, FULL),
])  # fmt: skip
def test_a_pdf_is_one_page_with_nothing_cut_or_overlapping(name, count, more):
    sheet, _ = sheets(name, count, parameters=2, **more)
    data = as_pdf(sheet)
    assert len(PAGES.findall(data)) == 1
    boxes = boxes_of(sheet)
    assert len(boxes) > 40
    slack = 1.5  # points: the last line's letters reach below it, and an outline is not as wide as its letters
    for left, bottom, right, top in boxes:
        assert left >= MARGIN - slack
        assert right <= WIDTH - MARGIN + slack
        assert bottom >= MARGIN - slack
        assert top <= HEIGHT - MARGIN + slack
    crossing = [
        (one, two)
        for one, two in itertools.combinations(boxes, 2)
        if min(one[2], two[2]) - max(one[0], two[0]) > 0.5 and min(one[3], two[3]) - max(one[1], two[1]) > 0.5
    ]
    assert crossing == []


def test_what_does_not_fit_is_refused():
    sheet, _ = sheets("dots")
    parts = sheet.parts * 4
    with pytest.raises(UserError, match="does not fit on one page"):
        set_to_fit(Sheet(sheet.title, sheet.word, sheet.said, parts, sheet.foot))


def test_letters_shrink_only_as_far_as_needed():
    usual, _ = set_to_fit(sheets("dots")[0])
    small, _ = set_to_fit(sheets("a cat " * 80, 40, parameters=2, **FULL)[0])
    assert LEAST <= small < usual == pytest.approx(8.6)


def test_letters_that_the_font_lacks_are_spelled_out():
    assert drawable("a\u4e2db") == "a\\u4e2db"
    assert drawable("Größe – naïve €") == "Größe – naïve €"


@pytest.mark.parametrize("most", [30.0, 60.0, 200.0])
def test_wrapping_loses_nothing_and_no_line_is_too_long(most):
    text = "switched off: 18,007 of layer4.1.conv2.weight and " + "x" * 90
    lines = wrapped(text, 8.0, most)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(width_of(line, 8.0) for line in lines) <= most
    pairs = [(one, two.split(" ")[0]) for one, two in itertools.pairwise(lines) if "x" not in one]
    assert all(width_of(f"{one} {word}", 8.0) > most for one, word in pairs)  # no word was sent down for nothing


def test_a_models_card_is_one_for_a_hub():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard(as_markdown(sheets("true: [no")[1]))
    assert card.data.library_name == "mimu"
    assert "machine-unlearning" in card.data.tags


# --- in a browser -----------------------------------------------------------------------------------------

MEASURE = """<script>
const out = document.documentElement, body = getComputedStyle(document.body);
document.title = JSON.stringify({ over: out.scrollWidth - out.clientWidth, background: body.backgroundColor,
  colour: body.color, headings: [...document.querySelectorAll("h2")].map(one => one.textContent) });
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)], ids=["light and wide", "dark and narrow"])
def test_the_page_fits_its_window_in_light_and_dark(home, tmp_path, width, dark):
    html = (home / "mask-certificate/certificate.html").read_text().replace("</body>", MEASURE + "</body>")
    (tmp_path / "page.html").write_text(html)
    flags = [*FLAGS, NOWHERE, f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"]
    done = subprocess.run(
        [find_browser(), *flags, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen["over"] <= 0
    assert seen["background"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert seen["headings"] == [
        *("The model and the mask", "What was measured", "The word, by rule", "What was not checked"),
        *("How to verify", "Who can lift it"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, FULL], ids=["suppressing", "erasing"])
def test_the_page_is_printed_on_one_sheet(tmp_path, more):
    (tmp_path / "page.html").write_text(as_html(*[(one := sheets("dots", **more)[0]), "dots"]))
    assert isinstance(one, Sheet)
    flags = [*FLAGS, NOWHERE, f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer"]
    words = [find_browser(), *flags, f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri()]
    subprocess.run(words, capture_output=True, timeout=120, check=True)
    assert len(PAGES.findall((tmp_path / "page.pdf").read_bytes())) == 1


def test_every_class_of_the_helper_is_named_in_some_page(home):
    """The fixture's mask forgets one class; the page names it and no other."""
    html = (home / "mask-certificate/certificate.html").read_text()
    assert [name for name in NAMES if re.search(rf"\b{name}\b", texts(html))] == ["dots"]
    assert forgotten(json.loads((home / "mask-certificate/certificate.json").read_text())) == "dots"
