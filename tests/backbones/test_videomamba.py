"""VideoMamba beyond the contract and the golden data: clips, inflation, masks, initialisation."""

import pytest
import timm
import torch

import linescan
from linescan.backbones.videomamba import VideoMamba, VideoMambaPretrain

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=5)


@pytest.mark.parametrize("frames, size", [(8, (32, 32)), (12, (32, 32)), (3, (40, 24))])
def test_clips_of_other_lengths_and_sizes(frames, size):
    torch.manual_seed(0)
    model = VideoMamba(num_frames=8, **SMALL).eval()
    torch.nn.init.normal_(model.temporal_pos_embed)
    clip = torch.randn(2, 3, frames, *size)
    assert model(clip).shape == (2, 5)
    assert not torch.allclose(model(clip), model(clip.flip(2)), atol=1e-4), "the order of frames matters"
    (tokens,) = model.forward_intermediates(clip, indices=[-1], intermediates_only=True)
    assert tokens.shape == (2, 32, frames, size[0] // 8, size[1] // 8)


def test_an_image_checkpoint_inflates_into_a_video_model(tmp_path):
    torch.manual_seed(0)
    image = VideoMamba(**SMALL)
    torch.save({"model": image.state_dict()}, tmp_path / "image.pth")
    video = linescan.load_checkpoint(VideoMamba(num_frames=4, tubelet_size=2, **SMALL), tmp_path / "image.pth")
    assert torch.equal(video.patch_embed.weight[:, :, 1], image.patch_embed.weight)
    assert torch.all(video.patch_embed.weight[:, :, 0] == 0)
    # one still tubelet is the image
    still = torch.randn(1, 3, 1, 32, 32)
    video.eval(), image.eval()
    assert torch.allclose(video(still.expand(-1, -1, 2, -1, -1)), image(still[:, :, 0]), atol=1e-5)


def test_tags_set_frames_size_and_file():
    model = timm.create_model("videomamba_video_tiny_patch16_224.ssv2_f16_res288", depth=1)
    assert model.num_frames == 16 and model.native_grid == (18, 18) and model.temporal_pos_embed.shape[1] == 16
    assert model.pretrained_cfg["hf_hub_filename"] == "videomamba_t16_ssv2_f16_res224to288.pth"
    assert model.pretrained_cfg["num_classes"] == 174


def test_masks_are_checked_and_hidden_tokens_have_no_effect():
    torch.manual_seed(0)
    model = VideoMambaPretrain(num_frames=2, output_dim=8, img_size=32, patch_size=8, embed_dim=32, depth=2).eval()
    clip = torch.randn(2, 3, 2, 32, 32)
    mask = torch.zeros(2, 33, dtype=torch.bool)
    mask[:, 1:9] = True  # the upper half of the first frame
    decoded, _ = model.forward_decoded(clip, mask)
    assert decoded.shape == (1, 2, 25, 8)
    assert torch.allclose(decoded.norm(dim=-1), torch.ones(1, 2, 25), atol=1e-5)
    changed = clip.clone()
    changed[:, :, 0, :16] = 7.0
    assert torch.equal(decoded, model.forward_decoded(changed, mask)[0])
    mask[0, 20] = True
    with pytest.raises(ValueError, match="same number"):
        model.forward_decoded(clip, mask)
    with pytest.raises(ValueError, match="mask is bool"):
        model.forward_decoded(clip, mask.float())


def test_the_last_block_learns_nothing_in_published_pretraining():
    torch.manual_seed(0)
    model = VideoMambaPretrain(num_frames=2, output_dim=8, img_size=32, patch_size=8, embed_dim=32, depth=2)
    model.forward_decoded(torch.randn(1, 3, 2, 32, 32))[0].sum().backward()
    assert model.blocks[1].mixer.in_proj.weight.grad is None
    assert model.blocks[0].mixer.in_proj.weight.grad.abs().sum() > 0


def test_published_initialisation():
    torch.manual_seed(0)
    model = VideoMamba(embed_dim=192, depth=2)
    mixer = model.blocks[0].mixer
    assert torch.all(mixer.dt_bias == 0) and torch.all(model.cls_token == 0)
    for weight in (mixer.dt_proj, mixer.x_proj, mixer.in_proj.weight, model.pos_embed):
        assert abs(weight.std().item() - 0.02) < 0.002


def test_frames_are_whole_tubelets():
    with pytest.raises(ValueError, match="multiple of tubelet_size"):
        VideoMamba(num_frames=5, tubelet_size=2, **SMALL)
    with pytest.raises(ValueError, match="expects clips"):
        VideoMamba(num_frames=4, **SMALL)(torch.randn(1, 3, 32, 32))
