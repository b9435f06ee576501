"""RWKV-SAM's segmentor beyond the golden data: prompts of all kinds, batches, files, gradients."""

from pathlib import Path

import pytest
import torch

import linescan
from linescan import zoo
from linescan.backbones.rwkvsam import RWKVSAM
from linescan.heads.prompting.rwkvsam import PromptEncoder, RWKVSAMPrompter
from tests.parity import recipe

DATA = Path(recipe.__file__).parent / "data"
SMALL = dict(img_size=64, dims=(8, 16, 32), depths=(1, 1, 2), dim=32)


def small():
    torch.manual_seed(0)
    return RWKVSAMPrompter(**SMALL).eval()


def test_prompts_of_one_image_are_independent_and_as_of_many_images():
    model = small()
    images = torch.randn(2, 3, 64, 96)
    points, boxes = torch.rand(3, 2, 2) * 64, torch.tensor([[3.0, 4, 40, 50], [0, 0, 95, 63], [20, 10, 30, 60]])
    with torch.no_grad():
        for prompts in ({"points": points}, {"boxes": boxes}, {"points": points, "boxes": boxes}):
            together, iou = model(images[:1], **prompts)
            assert together.shape == (3, 1, 16, 24) and iou.shape == (3, 1)
            for i in range(3):
                alone, score = model(images[:1], **{name: x[i : i + 1] for name, x in prompts.items()})
                assert torch.allclose(alone[0], together[i], atol=1e-5) and torch.allclose(score[0], iou[i], atol=1e-5)
            assert not torch.allclose(together[0], together[1], atol=1e-4)
            own, _ = model(images, **{name: x[:2] for name, x in prompts.items()})
            assert torch.allclose(own[0], together[0], atol=1e-5)
            assert torch.allclose(own[1], model(images[1:], **{n: x[1:2] for n, x in prompts.items()})[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_serves_any_number_of_prompts():
    model = small()
    images, points = torch.randn(3, 3, 64, 96), torch.rand(3, 2, 2) * 64
    with torch.no_grad():
        traced = torch.jit.trace(model, (images[:2], points[:2]), check_trace=False)
        for got, want in zip(traced(images, points), model(images, points)):
            assert torch.allclose(got, want, atol=1e-5)


def test_points_are_shares_of_the_size_that_the_model_is_built_for():
    model, wide = small(), RWKVSAMPrompter(**{**SMALL, "img_size": 128}).eval()
    wide.load_state_dict(model.state_dict())
    x, points = torch.randn(1, 3, 64, 96), torch.rand(1, 2, 2) * 64
    with torch.no_grad():
        want = model(x, points)[0]
        assert torch.allclose(wide(x, 2 * points + 0.5)[0], want, atol=1e-4)
        assert not torch.allclose(wide(x, points)[0], want, atol=1e-3)


def test_tokens_of_prompts():
    torch.manual_seed(0)
    encoder = PromptEncoder(32)
    points = torch.tensor([[[7.5, 11.5], [0.0, 0.0]]])
    tokens = encoder((32, 64), points, torch.tensor([[0, -1]]))
    assert tokens.shape == (1, 3, 32)
    share = torch.tensor([8 / 64, 12 / 32])
    angle = 2 * torch.pi * (2 * share - 1) @ encoder.frequencies
    assert torch.allclose(tokens[0, 0], torch.cat([angle.sin(), angle.cos()]) + encoder.point.weight[0], atol=1e-5)
    assert torch.equal(tokens[0, 1], encoder.not_a_point.weight[0]) and torch.equal(tokens[0, 2], tokens[0, 1])
    box = torch.tensor([[7.5, 11.5, 63.5, 31.5]])
    both = encoder((32, 64), points[:, :1], boxes=box, point_size=(64, 128))
    assert both.shape == (1, 3, 32), "with a box no token stands for it"
    assert torch.allclose(both[0, 1], tokens[0, 0] - encoder.point.weight[0] + encoder.point.weight[2], atol=1e-5)
    corner = encoder.positions(torch.ones(2)) + encoder.point.weight[3]
    assert torch.allclose(both[0, 2], corner, atol=1e-5)
    half = encoder.positions(share / 2) + encoder.point.weight[1]
    assert torch.allclose(both[0, 0], half, atol=1e-5), "points are shares of another size"
    cell = encoder.grid(4, 8)[0, :, 1, 2]
    assert torch.allclose(cell, encoder.positions(torch.tensor([2.5 / 8, 1.5 / 4])), atol=1e-6)


def test_every_parameter_is_trained_by_points_boxes_and_masks():
    model = small().train()
    x, masks = torch.randn(1, 3, 64, 64), torch.randn(2, 1, 16, 16)
    points, boxes = torch.rand(2, 1, 2) * 64, torch.tensor([[3.0, 4, 40, 50], [0, 0, 60, 63]])
    logits, iou = model(x, points=points)
    refined, score = model(x, points=points, labels=torch.zeros(2, 1, dtype=torch.long), boxes=boxes, masks=masks)
    assert not torch.allclose(refined, model(x, points=points, boxes=boxes)[0])
    (logits.square().mean() + refined.square().mean() + iou.sum() + score.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert model.decoder.mask_tokens.weight.grad[1:].abs().max() == 0, "one mask a prompt"


def test_files_serve_the_segmentor_and_its_encoder(tmp_path):
    model = small()
    path = tmp_path / "own.pth"
    torch.save(model.state_dict(), path)
    again = linescan.load_checkpoint(RWKVSAMPrompter(**SMALL), path).eval()
    x, points = torch.randn(1, 3, 64, 64), torch.rand(1, 1, 2) * 64
    with torch.no_grad():
        assert torch.equal(model(x, points=points)[0], again(x, points=points)[0])
    manifest = recipe.load_manifest(DATA / "rwkvsam__tiny_depth2.json")
    official = {f"backbone.{k}": torch.from_numpy(v) for k, v in recipe.state_dict(manifest).items()}
    torch.save({"state_dict": official}, path)
    encoder = linescan.load_checkpoint(RWKVSAM(num_classes=0, dims=(32, 64, 192), depths=(2, 4, 2)), path)
    assert torch.equal(encoder.stages[2].norm.weight, official["backbone.final_norm.weight"])
    del official["backbone.layers.1.attn.spatial_decay"]
    torch.save({"state_dict": official}, path)
    with pytest.raises(linescan.CheckpointError, match="1 keys missing .first: stages.2.blocks.1.mixer.decay"):
        linescan.load_checkpoint(encoder, path)


def test_the_zoo_and_errors():
    names = zoo.list_models(task="prompting")
    assert names == ["rwkvsam_base_prompt", "rwkvsam_small_prompt"]
    assert {zoo.find(name).terms for name in names} == {"non-commercial"}
    with torch.device("meta"):
        model = linescan.create_model("rwkvsam_small_prompt")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 24.242
    with pytest.raises(linescan.InputError, match="sides are multiples of 16, not 64x72"):
        small().encode(torch.randn(1, 3, 64, 72))
    features = small().encode(torch.randn(1, 3, 64, 64))
    for wrong in ({}, {"masks": torch.zeros(1, 1, 16, 16)}, {"points": torch.rand(2, 1, 2), "boxes": torch.rand(1, 4)}):
        with pytest.raises(linescan.InputError, match="a prompt has points or a box"):
            small().decode(features, **wrong)
    with pytest.raises(linescan.InputError, match="depths are 3 numbers"):
        RWKVSAMPrompter(depths=(1, 1, 1, 1))


def test_a_fresh_decoder_attends_to_the_place_of_a_prompt():
    """Prompts have an effect from the start: a point's token and the cell at its place go together best."""
    torch.manual_seed(0)
    model = RWKVSAMPrompter(**SMALL | {"dim": 128})
    cells = model.prompt_encoder.grid(6, 6)[0].flatten(1).T
    for block in model.decoder.blocks:
        for layer in (block.to_image, block.to_tokens):
            alike = layer.q_proj(cells) @ layer.k_proj(cells).T
            assert (alike.argmax(1) == torch.arange(36)).float().mean() > 0.9
