"""LION: layers over groups of voxels, merging, and what its outputs may not depend on. Golden data: tests/parity."""

import pytest
import torch

from linescan.backbones.points.lion import LION, OPERATORS, LIONLayer, Place, RetentionMixer, VoxelMerging
from linescan.errors import InputError
from linescan.layers.sparse import Sites, SparseTensor
from linescan.scans import retention


def voxels(count=60, dim=16, batch=2, grid=(32, 12, 16), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(batch * grid[0] * grid[1] * grid[2], generator=generator)[:count].sort().values
    coords = torch.stack(torch.unravel_index(cells, (batch, *grid)), 1)
    return SparseTensor(torch.randn(count, dim, generator=generator, dtype=dtype), Sites(coords, grid, batch))


def tiny(operator="mamba", **args):
    torch.manual_seed(0)
    args = {"dim": 16, "groups": (32, 16), "windows": ((32, 5, 5), (16, 5, 5)), "drop_path_rate": 0.0} | args
    own = {} if operator == "mamba" else {"num_heads": 2}
    return LION(operator=operator, operator_args=own, **args)


def by_cell(x, sample=None):
    """Features by coordinates, of one sample."""
    rows = zip(x.sites.coords.tolist(), x.features)
    return {tuple(c[1:]): f for c, f in rows if sample in (None, c[0])}


@pytest.mark.parametrize("operator", OPERATORS)
def test_batch_order_and_gradients(operator):
    """Each sample as if it were alone, in whatever order its voxels come; every parameter has a part in it."""
    model = tiny(operator).double()
    x = voxels(dtype=torch.float64)
    shuffled = torch.randperm(len(x.sites), generator=torch.Generator().manual_seed(1))
    model.eval()
    whole, again = (
        model(SparseTensor(x.features[i], Sites(x.sites.coords[i], x.sites.shape, 2)))
        for i in (torch.arange(len(shuffled)), shuffled)
    )
    assert whole.sites.shape == (8, 12, 16)
    assert torch.equal(whole.sites.coords, again.sites.coords)
    torch.testing.assert_close(whole.features, again.features)
    for sample in range(2):
        own = x.sites.coords[:, 0] == sample
        coords = x.sites.coords[own] * torch.tensor([0, 1, 1, 1])
        alone = by_cell(model(SparseTensor(x.features[own], Sites(coords, x.sites.shape, 1))))
        together = by_cell(whole, sample)
        assert alone.keys() == together.keys()
        assert all(torch.allclose(alone[c], together[c], atol=1e-9) for c in alone)
    model.train()
    with torch.no_grad():  # scales of branches start near 0
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model(x).features.sin().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for enable in (False, True):
        model = tiny("rwkv").double()
        model.set_grad_checkpointing(enable)
        model(voxels(dtype=torch.float64)).features.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_flat_map_and_wrong_arguments():
    model = tiny(flat_windows=(5,), groups=(32,) * 4, windows=((32, 5, 5),) * 4).eval()
    y = model(voxels())
    assert y.sites.shape == (12, 16) and y.sites.coords.shape[1] == 3
    assert len(y.sites.coords.unique(dim=0)) == len(y.sites)
    with pytest.raises(InputError, match="operator.*gru"):
        LION(operator="gru")
    with pytest.raises(InputError, match="3 and 4"):
        LION(groups=(1, 2, 3))


def test_a_sample_without_voxels():
    x = voxels(batch=3, count=40)
    x = SparseTensor(x.features, Sites(x.sites.coords % torch.tensor([2, 99, 99, 99]) * torch.tensor([2, 1, 1, 1]),
                                       x.sites.shape, 3))  # fmt: skip
    coords, first = x.sites.coords.unique(dim=0), 0
    y = tiny().eval()(SparseTensor(x.features[first : len(coords)], Sites(coords, x.sites.shape, 3)))
    assert set(y.sites.coords[:, 0].tolist()) == {0, 2} and y.features.isfinite().all()
    empty = SparseTensor(torch.zeros(0, 16), Sites(torch.zeros(0, 4, dtype=torch.long), (32, 12, 16), 1))
    assert len(tiny().eval()(empty).sites) == 0


def test_layers_read_groups_and_write_every_voxel_back():
    """With an operator that numbers its tokens, each voxel gets its place in its group: along x, then y."""

    class Number(torch.nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]

    x = voxels(count=50, dim=1, batch=1)
    x = x.replace(torch.zeros(50, 1))
    layer = LIONLayer([Number(), torch.nn.Identity()], (32, 13, 13), 16, shift=False)
    y = layer(x).features[:, 0]
    by_x = sorted(range(50), key=lambda i: [x.sites.coords[i][k].item() // (13 if k > 1 else 32) for k in (3, 2, 1)]
                  + [x.sites.coords[i][k].item() for k in (3, 2, 1)])  # fmt: skip
    assert [y[i].item() for i in by_x] == [i % 16 for i in range(50)]


def test_added_voxels_stand_in_the_diagonals_of_the_strongest():
    x = voxels(count=20, dim=4, batch=1)
    merge = VoxelMerging(4, (2, 1, 1), share=0.1)
    score = torch.zeros(20)
    score[7], score[3] = 2, 1
    added = merge.around(x.sites, score)
    want = [(0, z, min(max(y + dy, 0), 11), min(max(x_ + dx, 0), 15))
            for dy, dx in ((1, -1), (1, 1), (-1, -1), (-1, 1))
            for z, y, x_ in (x.sites.coords[7, 1:].tolist(), x.sites.coords[3, 1:].tolist())]  # fmt: skip
    assert [tuple(row) for row in added.tolist()] == want


def test_retention_sees_what_is_behind_in_its_chunk_only():
    mixer = RetentionMixer(8, 2, chunk=4).double()
    x = torch.randn(1, 10, 8, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, 5].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [True] * 8 + [False] * 2
    one = RetentionMixer(8, 2, chunk=1).double()
    one.load_state_dict(mixer.state_dict())
    q, k, v = (layer(x).unflatten(-1, (2, -1))[:, None] for layer in (one.q_proj, one.k_proj, one.v_proj))
    torch.testing.assert_close(one(x), one.o_proj(retention(q, k, v)[:, 0].flatten(2)))


def test_only_the_first_block_of_rwkv_normalises_its_stream():
    first, later = (OPERATORS["rwkv"](16, Place(i, 34), 0.0, num_heads=2) for i in (0, 5))
    assert isinstance(first.pre_norm, torch.nn.LayerNorm) and isinstance(later.pre_norm, torch.nn.Identity)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(first(x + 3), first(x))
