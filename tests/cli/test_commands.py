"""The `linescan` command: what it prints, and what it says to bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from linescan import tensorfile
from linescan.demos.digits import RECIPE
from linescan.engine.cards import ModelCard, plain_preprocess, save_model
from linescan.engine.image_sets import Digits
from linescan.engine.metrics import read_metrics

from ..conftest import SMALL, write_images
from ..tasks.test_classify import Bomb

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}


@pytest.fixture
def digits(tmp_path):
    """A folder with three held-out digits."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for i in range(3):
        Digits(True).image(i, channels=1).save(folder / f"{i}.png")
    return folder


def test_classify(linescan_command, trained, digits):
    done = linescan_command(
        "classify", digits, digits / "0.png", "--checkpoint", trained / "model.safetensors", "-k", 2
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"{digits}/0.png: "), "what is given twice is answered once"
    assert lines[0].count("%") == 2 and done.stderr == ""


def test_classify_skips_broken_images_and_says_so(linescan_command, trained, digits):
    (digits / "1.png").write_bytes((digits / "1.png").read_bytes()[:60])
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(digits / "nan.tiff")
    done = linescan_command("classify", digits, "--checkpoint", trained / "model.safetensors", "--json")
    assert done.returncode == 1
    results = {r["source"].rsplit("/", 1)[1]: r for r in json.loads(done.stdout)}
    assert sorted(results) == ["0.png", "1.png", "2.png", "nan.tiff"]
    assert "NaN" in results["nan.tiff"]["error"] and "1.png" in results["1.png"]["error"]
    assert len(results["2.png"]["answer"]) == 5
    assert results["2.png"]["answer"][0].keys() == {"label", "probability", "index"}
    assert "skipped" in done.stderr and "Traceback" not in done.stderr


def test_evaluate_finds_what_training_wrote(linescan_here, trained):
    status, stdout, _ = linescan_here(
        "evaluate", "--data", "digits", "--checkpoint", trained / "model.safetensors", "--json"
    )
    scores = json.loads(stdout)
    written = [row for row in read_metrics(trained / "metrics.csv") if "val_top1" in row][-1]
    assert status == 0 and scores["samples"] == 359
    assert scores["top1"] == pytest.approx(written["val_top1"], abs=1e-9)
    assert scores["loss"] == pytest.approx(written["val_loss"], rel=1e-5)


def test_evaluate_a_folder(linescan_here, trained, tmp_path):
    held_out = Digits(True)
    for i in range(40):
        folder = tmp_path / "val" / held_out.classes[held_out.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        held_out.image(i, channels=1).save(folder / f"{i}.png")
    (tmp_path / "val" / "3" / "broken.png").write_bytes(b"")
    args = ("evaluate", "-d", tmp_path / "val", "-c", trained / "model.safetensors", "--workers", 0)
    status, stdout, stderr = linescan_here(*args)
    assert status == 1 and "on 40 samples" in stdout and "broken.png" in stderr
    status, _, stderr = linescan_here("evaluate", "-d", write_images(tmp_path / "other"), *args[3:])
    assert status == 2 and "3 classes, the model 10" in stderr


def test_train_on_a_folder(linescan_command, images, tmp_path):
    args = ("train", "-d", images, "-o", "run", "-e", 2, "-b", 8, *SMALL, "--warmup", 0, "--lr", 3e-3, "--workers", 1)
    done = linescan_command(*args, "--mixup", 0.2, "--cutmix", 1, "--erasing", 0.2, "--ema", 0.9, "--holdout", 0.25)
    assert done.returncode == 0, done.stderr
    assert "epoch   2/2" in done.stderr and "Warning" not in done.stderr
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {
        "recipe.json", "state.pt", "model.safetensors", "best.safetensors", "metrics.csv", "tensorboard",
    }  # fmt: skip
    assert list((run / "tensorboard").iterdir())
    guesses = linescan_command("classify", images / "circle", "-c", run / "model.safetensors", "--json")
    assert {g["label"] for r in json.loads(guesses.stdout) for g in r["answer"]} == {"circle", "square", "stripe"}
    again = linescan_command(*args)
    assert again.returncode == 2 and again.stderr.startswith("linescan: run already holds a run; --resume")


def test_list(linescan_here):
    status, stdout, _ = linescan_here("list", "vim_tiny*", "--json")
    models = {m["model"]: m for m in json.loads(stdout)}
    assert status == 0 and models["vim_tiny_patch16_224"]["family"] == "vim"
    assert (
        models["vim_tiny_patch16_224"]["metrics"] == {"top1": 76.1}
        and models["vim_tiny_patch16_224"]["licence"] == "Apache-2.0"
    )
    status, stdout, _ = linescan_here("list")
    assert status == 0 and "vim_small_patch16_stride8_224" in stdout
    status, _, stderr = linescan_here("list", "convnext")
    assert status == 2 and "'convnext'" in stderr


def test_info(linescan_here):
    status, stdout, _ = linescan_here("info", "vim_tiny_patch16_224", "--json")
    facts = json.loads(stdout)
    assert status == 0 and facts["measured"]["params"] == 7_148_008  # counted from the published file
    assert "hustvl/Vim-tiny-midclstok" in facts["weights"]
    assert linescan_here("info", "vim_tiny_patch16_224", "--img-size", 64, "--model-arg", "depth=2")[0] == 0


def test_doctor(linescan_here):
    status, stdout, _ = linescan_here("doctor", "--json")
    assert status == 0 and json.loads(stdout)["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("spec, size", [("row,-row", "4x6"), ("hilbert", "7x5"), ("cls(snake, at=middle)", "4x4")])
def test_routes(linescan_here, tmp_path, spec, size):
    out = tmp_path / "new" / "routes.png"
    status, stdout, _ = linescan_here("routes", spec, "--size", size, "--out", out)
    assert status == 0 and stdout.strip() == str(out)
    with Image.open(out) as image:
        assert min(image.size) > 100


@pytest.mark.parametrize(
    "command",
    ["", "list", "info", "classify", "train", "evaluate", "routes", "doctor", "demo"],
    ids=lambda c: c or "all",
)
def test_help_teaches(linescan_here, command):
    status, stdout, _ = linescan_here(*command.split(), "--help")
    assert status == 0 and (f"linescan {command}" in stdout if command else "demo" in stdout)
    assert not command or "Examples" in stdout


def test_no_command_shows_the_help(linescan_here):
    status, stdout, _ = linescan_here()
    assert status == 0 and "classify" in stdout


ABSENT = "nowhere.png"
BAD = {
    "unknown command": (["trian"], "trian"),
    "unknown option": (["list", "--colour"], "--colour"),
    "missing argument": (["classify"], "Missing argument"),
    "no such file": (["classify", ABSENT], f"{ABSENT} does not exist"),
    "empty folder": (["classify", "EMPTY", "-c", "CHECKPOINT"], "holds no images or videos"),
    "no model": (["classify", "PICTURE"], "--model"),
    "unknown model": (["classify", "PICTURE", "-m", "vim_tinny_patch16_224"], "near it: vim_tiny_patch16_224"),
    "another model": (["classify", "PICTURE", "-m", "vim_tiny_patch16_224", "-c", "CHECKPOINT"], "not of vim"),
    "truncated checkpoint": (["classify", "PICTURE", "-c", "CUT"], "cut short"),
    "pickle with code": (["classify", "PICTURE", "-m", "vim_tiny_patch16_224", "-c", "BOMB"], "refused"),
    "wrong channel count": (["classify", "PICTURE", "-c", "CHECKPOINT", "--model-arg", "in_chans=3"], "another shape"),
    "unreadable channel count": (["classify", "PICTURE", "-c", "FIVE"], "this model expects 5"),
    "image smaller than a patch": (
        ["classify", "PICTURE", "-c", "VIM", "--model-arg", "img_size=4"], "at least 8x8 pixels, not 4x4"
    ),
    "model argument": (["info", "vim_tiny_patch16_224", "--model-arg", "depth"], "KEY=VALUE"),
    "unknown model argument": (["info", "vim_tiny_patch16_224", "--model-arg", "deep=2"], "deep"),
    "no such device": (["classify", "PICTURE", "-c", "CHECKPOINT", "--device", "abacus"], "'abacus'"),
    "empty data folder": (["train", "-d", "EMPTY", "-o", "run"], "no class folders"),
    "one class": (["train", "-d", "ONE", "-o", "run"], "one class only"),
    "no data": (["train", "-d", "nowhere", "-o", "run"], "is not a folder"),
    "odd batch": (["train", "-d", "digits", "-o", "run", "-b", "7", "--mixup", "1"], "even"),
    "augmentation": (["train", "-d", "digits", "-o", "run", *SMALL, "--augment", "rand-m9"], "RGB"),
    "no route": (["routes", "sideways"], "there are: row"),
    "no grid": (["routes", "row", "--size", "14"], "HEIGHTxWIDTH"),
    "no image format": (["routes", "row", "-o", "routes.doc"], ".png"),
    "evaluate nothing": (["evaluate", "-d", "nowhere", "-c", "CHECKPOINT"], "is not a folder"),
}  # fmt: skip


@pytest.fixture(scope="session")
def bad(tmp_path_factory, trained):
    """Files that are wrong, each in its way, by the names that BAD uses."""
    from linescan.engine.cards import ModelCard, build, save_model
    from linescan.media.preprocess import Preprocess

    root = tmp_path_factory.mktemp("bad")
    checkpoint = trained / "model.safetensors"
    files = {name: root / name.lower() for name in ("EMPTY", "ONE", "CUT", "BOMB", "PICTURE", "FIVE", "VIM")}
    files["EMPTY"].mkdir()
    write_images(files["ONE"], classes=("only",))
    Image.new("L", (8, 8)).save(files["PICTURE"], format="png")
    files["CUT"].write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"model": {"x": torch.zeros(1)}, "extra": Bomb(root / "it_ran")}, files["BOMB"])
    args = dict(img_size=16, patch_size=8, depth=1, embed_dim=16, num_classes=2)
    for name, channels in (("FIVE", 5), ("VIM", 3)):
        args = {**args, "in_chans": channels}
        preprocess = Preprocess((channels, 16, 16), (0.5,) * channels, (0.5,) * channels)
        card = ModelCard("vim_tiny_patch16_224", args, ["a", "b"], preprocess)
        save_model(files[name], build("vim_tiny_patch16_224", **args), card)
    return {**{k: str(v) for k, v in files.items()}, "CHECKPOINT": str(checkpoint), "ROOT": root}


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line_and_status_2(linescan_here, bad, monkeypatch, tmp_path, args, said):
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = linescan_here(*[bad.get(arg, arg) for arg in args])
    assert status == 2 and stdout == ""
    assert said in stderr and stderr.startswith("linescan: ") and stderr.count("\n") == 1
    assert not (bad["ROOT"] / "it_ran").exists()
    assert not (tmp_path / "run").exists()


def test_the_line_is_all_that_a_process_prints(linescan_command, bad):
    done = linescan_command("classify", bad["PICTURE"], "-m", "vim_tiny_patch16_224", "-c", bad["BOMB"])
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert not (bad["ROOT"] / "it_ran").exists()


def test_a_state_that_would_run_code_does_not(linescan_here, tmp_path):
    (tmp_path / "run").mkdir()
    torch.save({"recipe": Bomb(tmp_path / "it_ran")}, tmp_path / "run" / "state.pt")
    status, _, stderr = linescan_here("train", "-d", "digits", "-o", tmp_path / "run", *SMALL, "--resume")
    assert status == 2 and "would run code" in stderr and not (tmp_path / "it_ran").exists()


def test_divergence_gets_one_line_and_status_1(linescan_here, tmp_path):
    args = (
        "train",
        "-d",
        "digits",
        "-o",
        tmp_path / "run",
        *SMALL,
        "--lr",
        1e30,
        "--warmup",
        0,
        "-e",
        2,
        "--log-every",
        2,
    )
    status, _, stderr = linescan_here(*args)
    assert status == 1 and "lower --lr" in stderr.splitlines()[-1]


def test_published_weights_that_cannot_be_had(linescan_command, bad):
    """No network: one line, no traceback."""
    done = linescan_command("classify", bad["PICTURE"], "-m", "vim_tiny_patch16_224", **OFFLINE)
    assert done.returncode == 2 and "cannot build" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_demo(linescan_here, tmp_path, monkeypatch):
    """`make demo` after the installation, with a third of its epochs."""
    monkeypatch.setattr("linescan.demos.digits.RECIPE", replace(RECIPE, epochs=5))
    monkeypatch.chdir(tmp_path)
    status, _, said = linescan_here("demo")
    assert status == 0, said
    out = tmp_path / "runs" / "demo"
    assert (out / "demo.png").stat().st_size > 50_000 and len(list((out / "images").iterdir())) == 12
    judged = [row["val_top1"] for row in read_metrics(out / "metrics.csv") if "val_top1" in row]
    assert judged[-1] >= 95 and f"{judged[-1]:.2f} %" in said
    line = next(line for line in said.splitlines() if " classify " in line).split()
    status, answers, said = linescan_here(*line[1:])
    assert status == 0 and answers.count("\n") == 12, said


def test_of_many_files_that_cannot_be_read_three_are_named(linescan_here, tmp_path):
    code, _, said = linescan_here("classify", *(tmp_path / f"{i}.png" for i in range(5)))
    assert code == 2 and said.count("does not exist") == 3 and said.endswith("; and 2 more\n") and said.count("\n") == 1
    _, _, said = linescan_here("change", tmp_path / "no", tmp_path, "-m", "mambafcs_base")
    assert said.count(str(tmp_path)) == 1, "of two arguments that which is wrong"


@pytest.mark.parametrize(
    "words, message",
    [
        ("segment IMAGE -m sigma_tiny.mfnet", "sigma_tiny.mfnet reads 2 images of each scene (--extra), got 1"),
        ("segment IMAGE --extra IMAGE -m mhsvm_vmunet_4h", "mhsvm_vmunet_4h reads one image, got 2"),
        ("segment IMAGE -m mhsvm_vmunet_4h --stride 9", "a stride is one of windows"),
        ("change IMAGE IMAGE -m mambafcs_base --window 9 --stride 99", "leave gaps"),
        ("change IMAGE NONE -m mambafcs_base", "NONE does not exist"),
        ("restore IMAGE -m mambair_v2_light_x2 --device tpu", "device 'tpu' cannot be used here"),
        ("restore IMAGE -m mambair_v2_light_x2 --format bmp", "format is one of 'png'"),
        ("restore IMAGE -m mambair_v2_light_x2 -o IMAGE/out", "is a file; --out needs a folder there"),
        ("embed IMAGE -m vim_tiny_patch16_224 -o IMAGE/x.npz", "IMAGE is a file; --out needs a folder there"),
        ("evaluate -d digits -m vim_tiny_patch16_224 -o IMAGE/x", "IMAGE is a file; --out needs a folder there"),
        ("convert vim_tiny_patch16_224 -o IMAGE/x", "IMAGE is a file; --out needs a folder there"),
        ("restore OUT -m mambair_v2_light_x2 -o OUT", "those in OUT, where the outputs go, are passed over"),
        ("anomaly IMAGE -m mambaad_resnet34 --normal NONE", "NONE does not exist"),
        ("anomaly IMAGE -m mambaad_resnet34 --false-alarms 0.1", "--normal images, which are not given"),
        ("detect IMAGE -m mamba_yolo_world_small --stride 9", "a stride is one of windows"),
    ],
)  # fmt: skip
def test_what_needs_no_weights_is_refused_before_they_are_fetched(words, message, linescan_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("linescan.zoo.fetch", lambda *args: pytest.fail("fetched"))
    Image.new("RGB", (9, 9)).save("IMAGE", "PNG")
    (tmp_path / "OUT").mkdir()
    Image.new("RGB", (9, 9)).save("OUT/y.png")
    status, said, error = linescan_here(*words.split())
    assert status == 2 and not said and message in error and error.count("\n") == 1, error


CLASSIFIER, RESTORER = "vit_tiny_patch16_224", "mambair_v2_light_x2"


@pytest.mark.parametrize(
    "words, model, said",
    [
        ("restore IMAGE", CLASSIFIER, "restores no images; `linescan list --task restoration`"),
        ("anomaly IMAGE", CLASSIFIER, "finds no anomalies; `linescan list --task anomaly`"),
        ("change IMAGE IMAGE", CLASSIFIER, "finds no changes; `linescan list --task change`"),
        ("segment IMAGE", CLASSIFIER, "segments no images; `linescan list --task segmentation`"),
        ("detect IMAGE --text cat", CLASSIFIER, "detects nothing; `linescan list --task detection`"),
        ("prompt IMAGE --point 1,1", CLASSIFIER, "takes no prompts; `linescan list --task prompting`"),
        ("points classify CLOUD.npy", CLASSIFIER, "names no point clouds; `linescan list --task point-classification`"),
        ("points segment CLOUD.npy", CLASSIFIER, "segments no points; `linescan list --task point-segmentation`"),
        ("points detect CLOUD.npy", CLASSIFIER, "finds no boxes in scans; `linescan list --task point-detection`"),
        ("points occupancy CLOUD.npy", CLASSIFIER, "completes no scenes; `linescan list --task point-occupancy`"),
        ("evaluate --task anomaly --data .", CLASSIFIER, "finds no anomalies; `linescan list --task anomaly`"),
        ("classify IMAGE", RESTORER, "classifies no images; `linescan list --task classification`"),
        ("embed IMAGE --out x.npz", RESTORER, "classifies no images; `linescan list --task classification`"),
        ("quantize --method dynamic --out x.safetensors", RESTORER, "classifies no images; `linescan list"),
        ("evaluate --data digits", RESTORER, "classifies no images; `linescan list --task classification`"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_checkpoint_of_another_task_is_refused_by_its_card(
    words, model, said, kind, linescan_here, tmp_path, monkeypatch
):
    """In one line that is the same for all commands, before its weights are read."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("IMAGE", "PNG")
    np.save("CLOUD.npy", np.zeros((4, 3), np.float32))
    card = ModelCard(model, {}, [], plain_preprocess(3))
    if kind == "pt":
        torch.save({"linescan": card.as_dict(), "model": {"weight": torch.zeros(4)}}, "FILE.pt")
    else:
        save_model("FILE.safetensors", torch.nn.Linear(2, 2), card)
    monkeypatch.setattr(tensorfile, "_Storage", lambda *args: pytest.fail("weights are read"))
    monkeypatch.setattr("safetensors.torch.load_file", lambda *args: pytest.fail("weights are read"))
    status, shown, error = linescan_here(*words.split(), "--checkpoint", f"FILE.{kind}")
    assert status == 2 and not shown and error.count("\n") == 1, error
    assert error.startswith(f"linescan: FILE.{kind} is of {model}, which {said}"), error
    assert error.endswith(f"; {model} is for `linescan {'classify' if model == CLASSIFIER else 'restore'}`\n"), error
