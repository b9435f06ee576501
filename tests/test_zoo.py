"""The zoo: its facts are complete, every entry builds, tags decide, and timm's configurations say the same."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save
from torch import nn

import linescan
from linescan import zoo
from linescan.engine.cards import build
from linescan.errors import InputError
from linescan.notices import notice, show_notices_with

from .building import uninitialised

EVERY = [entry for name in linescan.list_models() for entry in zoo.tags(name)]
CLASSIFIERS = linescan.list_models(task="classification")


@pytest.mark.parametrize("entry", EVERY, ids=lambda entry: entry.full_name)
def test_facts_are_complete(entry):
    own = entry.paper == "linescan's own"
    assert own or re.fullmatch(r".*\d{4}, arXiv \d{4}\.\d{5}", entry.paper) and entry.arxiv
    assert own or entry.code.startswith("https://")
    assert entry.task and entry.licence in zoo.LICENCES
    assert all(shape and all(n > 0 for n in shape) for shape in entry.inputs) and entry.inputs
    if not entry.task.endswith("pretraining"):
        assert bool(entry.tag) == bool(entry.metrics), "a published file has a published result"
    json.dumps(entry.facts())
    assert not entry.tag or entry.data
    assert all(0 < value <= 100 for value in entry.metrics.values())
    assert not (entry.fetchable and entry.page)


@pytest.mark.parametrize("name", linescan.list_models())
def test_every_entry_is_as_large_as_published(name):
    built = {}  # by their arguments: most tags of a model have the same
    for entry in zoo.tags(name):
        key = repr(sorted(entry.args.items()))
        if key not in built:
            with torch.device("meta"), uninitialised():
                built[key] = linescan.create_model(entry.full_name)
        model = built[key]
        count = sum(p.numel() for p in model.parameters()) / 1e6
        own_tag = entry.tag in ("", zoo.find(name).tag)
        if entry.params and own_tag:
            assert round(count, 3) == pytest.approx(entry.params, abs=6e-4), entry.full_name
        if "num_classes" in entry.args and hasattr(model, "num_classes"):
            assert model.num_classes == entry.args["num_classes"]
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        for names in (entry.first_conv, entry.classifier):
            for layer in (names,) if isinstance(names, str) else names:
                assert f"{layer}.weight" in shapes
        if not entry.tag or len(zoo.tags(name)) > 8:
            break


@pytest.mark.parametrize("name, facts", [
    ("van_b2", {"crop_pct": 0.9, "mean": (0.5, 0.5, 0.5)}),
    ("inline_cswin_base", {"crop_pct": 0.875, "crop_mode": "squash"}),
    ("inline_swin_base_384", {"crop_pct": 1.0, "crop_mode": "squash"}),
    ("mambavision_small", {"crop_pct": 0.93}),
    ("mambavision_large3.in21k_ft_in1k_512", {"crop_pct": 0.93, "crop_mode": "squash"}),
    ("mamband_video_small_patch16_224.hmdb51", {"crop_pct": 0.875, "interpolation": "bilinear", "std": 3 * (0.225,)}),
    ("mamband_video_small_patch16_224.k400_f16", {"crop_pct": 1.0, "interpolation": "bilinear"}),
])  # fmt: skip
def test_images_are_prepared_as_their_authors_evaluate(name, facts):
    assert facts.items() <= zoo.find(name).preprocess.items()


def test_names_and_filters():
    assert set(zoo.list_models("vim_*_stride8_*")) == {"vim_small_patch16_stride8_224", "vim_tiny_patch16_stride8_224"}
    assert linescan.list_models("VIM_TINY") == linescan.list_models("vim_tiny")
    segmentors = [
        *(f"mhsvm_vmunet_{n}h" for n in (3, 4)),
        *(f"segman_seg_{s}" for s in ("base", "large", "small", "tiny")),
        *(f"sigma_{s}" for s in ("base", "small", "tiny")),
    ]
    assert linescan.list_models(task="segmentation") == segmentors
    assert "vmamba_tiny_s1l8" in linescan.list_models(licence="mit")
    terms = {term: set(linescan.list_models(licence=term)) for term in set(zoo.LICENCES.values())}
    assert "vim_tiny_patch16_224" in terms["permissive"] and "mamba3d_modelnet40" in terms["none"]
    assert set.union(*terms.values()) == set(linescan.list_models())
    assert [entry.family for entry in zoo.entries()] == sorted(entry.family for entry in zoo.entries())
    with pytest.raises(InputError, match="no model is for the task 'cooking'; there are: anomaly, change, class"):
        linescan.list_models(task="cooking")
    with pytest.raises(InputError, match="unknown licence 'beer'; there are: Apache-2.0"):
        linescan.list_models(licence="beer")
    with pytest.raises(InputError, match="near it: .*vim_tiny_patch16_224"):
        linescan.create_model("vim_tiny_patch16_242")
    with pytest.raises(InputError, match="has no tag 'in22k'; there are: in1k"):
        linescan.create_model("vim_tiny_patch16_224.in22k")


def test_timm_knows_the_same():
    assert {
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("linescan.")
    } == set(CLASSIFIERS)
    fetched = set(timm.list_pretrained())
    for entry in EVERY:
        if entry.task != "classification":
            continue
        cfg = timm.get_pretrained_cfg(entry.full_name)
        assert (cfg.url, cfg.hf_hub_filename, cfg.license) == (entry.url, entry.file, entry.licence.lower())
        assert cfg.hf_hub_id == (entry.hub if entry.file else None)
        assert cfg.num_classes == entry.args.get("num_classes", 1000)
        assert cfg.input_size == (entry.inputs[0][0], *entry.inputs[0][-2:]) and cfg.mean == entry.preprocess["mean"]
        assert (entry.full_name in fetched) == entry.fetchable
        default = zoo.find(entry.name)
        assert timm.get_pretrained_cfg(entry.name).tag == (default.tag or None)
    assert timm.get_pretrained_cfg("vim_tiny_patch16_224").paper_ids == "arXiv:2401.09417"


def test_a_tag_decides_classes_frames_and_grid():
    for create in (linescan.create_model, timm.create_model):
        model = create("videomamba_video_tiny_patch16_224.breakfast_f64", depth=1)
        assert (model.num_classes, model.num_frames, model.temporal_pos_embed.shape[1]) == (10, 64, 64)
        model = create("videomamba_video_tiny_patch16_224.ssv2_f16_res288", depth=1)
        assert (model.num_classes, model.num_frames, model.native_grid) == (174, 16, (18, 18))
        model = create("videomamba_video_tiny_patch16_224.coin_f32", depth=1, num_classes=3, num_frames=4)
        assert (model.num_classes, model.num_frames) == (3, 4)
        model = create("videomamba_video_tiny_patch16_224", depth=1)
        assert (model.num_classes, model.num_frames) == (400, 8)
        assert create("videomamba_tiny_patch16_224.in1k_448", depth=1).native_grid == (28, 28)
    with torch.device("meta"):
        small, city = (linescan.create_model(f"segman_seg_small.{tag}") for tag in ("ade20k", "cityscapes"))
    assert (small.decode_head.conv_seg.out_channels, city.decode_head.conv_seg.out_channels) == (150, 19)
    assert (small.decode_head.conv_seg.in_channels, city.decode_head.conv_seg.in_channels) == (144, 152)


def test_none_is_a_value_where_the_class_says_so():
    for create, none in ((linescan.create_model, None), (linescan.create_model, "none"), (timm.create_model, "none")):
        assert create("vim_tiny_patch16_224", depth=1, class_token=none).cls_token is None
        assert create("vim_tiny_patch16_224", depth=1, bimamba_type="none").blocks[0].mixer.along.n_routes == 1
        model = create("vrwkv_small", depth=1, init_values=none)
        assert not [key for key in model.state_dict() if "gamma" in key]
    with pytest.raises(ValueError, match="class_token"):
        linescan.create_model("vim_tiny_patch16_224", depth=1, class_token="tail")


def test_a_mapping_completes_the_entrys_own():
    with torch.device("meta"):
        model = linescan.create_model("segman_seg_tiny", backbone={"depths": (1, 1, 1, 1)})
    assert [len(stage.blocks) for stage in model.backbone.trunk.stages] == [1, 1, 1, 1]
    assert model.backbone.out_channels == [32, 64, 144, 192]


class Pair(nn.Module):
    """A model of another task, with two inputs."""

    def __init__(self, scale: int = 2, width: int = 4):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(1, width, 3)
        self.scale = scale

    def forward(self, x, y):
        return self.first(x) * self.scale + self.second(y)


@pytest.fixture
def register(monkeypatch):
    """`zoo.register`, undone after the test."""
    monkeypatch.setattr(zoo, "_ENTRIES", dict(zoo._ENTRIES))
    monkeypatch.setattr(zoo, "_said", set())
    facts = {
        "task": "depth", "inputs": ((3, 32, 32), (1, 32, 32)), "licence": "none", "paper": "2026, arXiv 2601.00001",
        "data": "rooms", "args": {"width": 6},
    }  # fmt: skip
    return lambda models, **more: zoo.register(Pair, models, **{**facts, **more})


def test_another_task_needs_no_timm(register):
    first, _ = register(
        {"pair": {"args": {"scale": 3}, "weights": {"x3": {"params": 1.0}, "x4": {"args": {"scale": 4}}}}}
    )
    assert first == zoo.find("pair") and first.params == 1.0 and zoo.find("pair.x4").params is None
    assert first.family == "test_zoo" and first.arxiv == "2601.00001"
    model = linescan.create_model("pair.x4")
    assert (model.scale, model.first.out_channels) == (4, 6)
    assert model(*(torch.zeros(1, *shape) for shape in first.inputs)).shape == (1, 6, 30, 30)
    assert linescan.list_models(task="depth") == ["pair"] and not timm.is_model("pair")
    with pytest.raises(ValueError, match="two models are registered as pair"):
        register({"pair": {}})
    with pytest.raises(TypeError, match="colour"):
        register({"other": {"colour": "red"}})
    with pytest.raises(ValueError, match="licence is one of .*, not 'beer'"):
        register({"other": {}}, licence="beer")


@pytest.fixture
def notices():
    lines = []
    show_notices_with(lambda line, loud: lines.append((line, loud)))
    yield lines
    show_notices_with(None)


class Server(BaseHTTPRequestHandler):
    """Serves one file, at any address."""

    content = b""
    asked: list = []

    def do_HEAD(self):
        self.asked.append(self.command)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


def test_fetching_prints_the_licence_once(register, notices, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/release/model.safetensors"
    Server.content = save(Pair().state_dict())
    register({
        "free": {"args": {"width": 4}, "licence": "MIT", "url": url},
        "closed": {"args": {"width": 4}, "licence": "CC-BY-NC-SA-4.0", "url": url},
        "silent": {"args": {"width": 4}, "url": f"{url}?other"},
    })  # fmt: skip
    entry = zoo.find("free")
    path = zoo.fetch(entry, tmp_path)
    assert path.parent == tmp_path and path.read_bytes() == Server.content
    assert notices == [(f"weights of free ({url}): licence MIT", False)]
    before = len(Server.asked)
    assert zoo.fetch(entry, tmp_path) == path and len(Server.asked) == before and len(notices) == 1  # from the cache
    other = zoo.fetch(zoo.find("silent"), tmp_path)
    assert other != path and other.name.endswith("-model.safetensors")  # of the same name, and not the same file
    zoo.fetch(zoo.find("closed"), tmp_path)
    (silent, loud), (closed, louder) = notices[1:]
    assert loud and "state no licence" in silent and louder and "CC-BY-NC-SA-4.0, for non-commercial use only" in closed
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    model = linescan.create_model("free", pretrained=True)
    assert model.first.out_channels == 4 and len(notices) == 3
    server.shutdown()


def test_plain_notices_go_to_stderr(capsys):
    notice("a line")
    notice("another", loud=True)
    assert capsys.readouterr() == ("", "a line\nWARNING: another\n")


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vmamba_tiny_s1l8", "resnet18"])  # the last one is timm's
@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_first_failed_connection_is_the_answer(monkeypatch, notices, tmp_path, name, offline):
    opened = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: opened.append(request) or fail())
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)

    def fail():
        raise URLError(OSError("Name or service not known"))

    said = f"cannot fetch https://.*: {'offline' if offline == '1' else 'no connection'}"
    with pytest.raises(InputError, match=said):
        zoo.fetch(zoo.find(name), tmp_path) if zoo.is_model(name) else build(name, pretrained=True)
    assert len(opened) == (offline == "0") and not notices


def test_weights_without_an_address_say_where_they_are():
    for name, page in (("vig_tiny", "huggingface.co/hustvl/ViG"), ("segman_seg_tiny", "drive.google.com")):
        with pytest.raises(InputError, match=f"no address that can be fetched: get the file from .*{page}") as error:
            linescan.create_model(name, pretrained=True)
        assert "linescan.load_checkpoint(model, PATH)" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no weights of local_vssm_tiny.in1k are published"):
        timm.create_model("local_vssm_tiny", pretrained=True)


def test_models_are_registered_where_linescan_comes_before_timm():
    program = "import linescan; from timm.models import *; import timm"
    check = "; assert timm.is_model('vim_tiny_patch16_224') and len(linescan.list_models()) > 50"
    done = subprocess.run([sys.executable, "-c", f"{program}{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_api():
    assert set(linescan.__all__) <= set(dir(linescan))
    assert sorted(linescan.__all__) == [
        "AnomalyDetector",
        "BoxDetector",
        "BrokenImage",
        "BrokenVideo",
        "ChangeDetector",
        "CheckpointError",
        "Classifier",
        "Detector",
        "InputError",
        "PartSegmenter",
        "PointClassifier",
        "Prompter",
        "Restorer",
        "SceneCompleter",
        "Segmenter",
        "VolumeSegmenter",
        "create_model",
        "list_models",
        "load_checkpoint",
        "read_state_dict",
    ]
    for name in linescan.__all__:
        assert getattr(linescan, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        linescan.creat_model


def test_the_pages_are_those_of_the_zoo():
    """docs/weights.md as `make models` writes it; docs/models.md, which is measured, has a row for every model."""
    docs = Path(__file__).parents[1] / "docs"
    spec = importlib.util.spec_from_file_location("models", docs.parent / "tools" / "models.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (docs / "weights.md").read_text() == tool.weights_page(), "run `make models`"
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (docs / "models.md").read_text(), re.M))
    assert rows.keys() == set(linescan.list_models()), "run `make models`"
    for entry in zoo.entries():
        published, measured, *_, licence = rows[entry.name].split(" | ")
        assert licence == entry.licence and published == tool.number(entry.params, 3)
        assert entry.params is None or abs(float(measured) - entry.params) < 1e-3
