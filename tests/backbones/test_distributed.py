"""DDP and FSDP of one model of each family, on two processes, against one process that sees all samples."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist

from linescan.backbones.contract import architecture
from linescan.backbones.feature_maps import dense_backbone
from linescan.zoo import list_models

from ..runs import in_two

NAMES = sorted({architecture(n)[0]: n for n in list_models(task="classification") if "_video" not in n}.values())
PLAIN, STAGES = dict(embed_dim=48, depth=2, img_size=32), dict(depths=(1, 1), dims=(32, 64))
OPTIONS = {  # what a family needs besides, and hybrids
    "segman": dict(dims=(16, 32), num_heads=(1, 2), windows=(3, 3), mlp_ratios=(2, 2), img_size=32),
    "vig_h": dict(num_heads=(1, 2)),
    "van": dict(mlp_ratios=(2, 2)),
    "care": dict(ratios=((2, 2), (2, 2)), head_dims=(8,)),
    "mambavision": dict(dims=(16, 32, 32), depths=(1, 1, 2), num_heads=(1, 1, 2), windows=(4, 4, 4)),
    "inline_deit": dict(num_heads=2),
    "inline_pvt": dict(num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(4, 2), attn_type="IS"),
    "inline_swin": dict(num_heads=(1, 2), attn_type="IS"),
    "inline_cswin": dict(num_heads=(2, 2), stripes=(2, 0), attn_type="SI"),
    "rwkvsam": dict(dims=(16, 32, 64), depths=(1, 1, 1)),
    "scan": dict(head_dim=16, mixer=("gla", "window")),
    "scanh": dict(mixer=("s6", "delta")),
}
DENSE = {  # with norms after each of two units, and no neck, but for
    "vim": dict(depth=4, stride=16, neck="rescaled", norms="last"),
    "vig": dict(neck={"type": "simple", "out_channels": 8}, out_indices=(1,)),
    "vrwkv": dict(depth=4, neck={"type": "adapter", "num_heads": 4, "width": 8}),
}


def options(name, dense=False):
    family = max((key for key in (*OPTIONS, *DENSE, "") if name.startswith(key)), key=len)
    short = PLAIN if architecture(name)[0].unit_name == "blocks" else STAGES
    more = DENSE.get(family, {"out_indices": (0, 1), "neck": None}) if dense else {}
    return {**short, **OPTIONS.get(family, {}), **more}


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options(name)).double()
    has_batch_norms = any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    # Those of half a batch are others; so are shuffles that each process draws.
    return model.eval() if has_batch_norms or name.startswith("rsmamba") else model.train()


def loss_of(model, x):
    y = model(x)
    return sum(m.square().mean() for m in y) if isinstance(y, list) else y.square().mean()


def samples():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model):
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()
    }


def compare(got, want, what):
    for name, grad in want.items():
        assert torch.allclose(got[name], grad, rtol=1e-6, atol=1e-9), f"{what}: {name}"


def work():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    own = samples()[2 * dist.get_rank() :][:2]
    for name in NAMES:
        whole = build(name)
        ddp, fsdp = copy.deepcopy(whole), copy.deepcopy(whole)
        loss_of(whole, samples()).backward()
        want = gradients(whole)

        ddp = DistributedDataParallel(ddp)  # an unused parameter would raise in the second step
        for _ in range(2):
            ddp.zero_grad()
            loss_of(ddp, own).backward()
        compare(gradients(ddp.module), want, f"DDP of {name}")

        for unit in fsdp.units:
            fully_shard(unit, mesh=mesh)
        fully_shard(fsdp, mesh=mesh)
        rows = [(p.to_local().numel(), p.numel()) for p in fsdp.parameters() if p.shape[:1] > (1,)]  # one stays whole
        assert sum(here for here, _ in rows) < 0.6 * sum(everywhere for _, everywhere in rows)
        loss_of(fsdp, own).backward()
        compare(gradients(fsdp), want, f"FSDP of {name}")

        dense = dense_backbone(name, **options(name, dense=True)).double().eval()
        ddp = DistributedDataParallel(dense)
        for _ in range(2):
            ddp.zero_grad()
            loss_of(ddp, own).backward()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    in_two(tmp_path, work)
