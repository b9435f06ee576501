"""How to call LION and its parts: module, inputs -> {name in the manifest: tensor}."""

import torch
from torch import nn

from linescan.backbones.points.lion import (
    OPERATORS,
    Place,
    PositionMLP,
    VoxelMerging,
    operators_from_official,
)
from linescan.checkpoint import rename
from linescan.layers.sparse import Sites, SparseTensor, from_spconv
from linescan.scans.routes import group_table, window_order

from . import recipe


def sites(coords, grid):
    """Voxels (b, z, y, x) in a grid (x, y, z) of the manifest."""
    return Sites(coords, grid[::-1], int(coords[:, 0].max()) + 1)


def watch(parts):
    """What the named modules give, as it comes."""
    seen, hooks = {}, []
    for name, part in parts.items():

        def keep(module, given, result, name=name):
            result = result[0] if type(result) is tuple else result
            seen[name] = result.features
            if name.startswith("dow"):
                seen[f"{name}_coords"] = result.sites.coords

        hooks.append(part.register_forward_hook(keep))
    return seen, hooks


def backbone(module, inputs, manifest):
    x = SparseTensor(inputs["voxel_features"], sites(inputs["voxel_coords"], manifest["grid_size_xyz"]))
    parts = {"layer1_0": module.blocks[0].encoder[0], "linear_out": module.out}
    for i, (block, merge) in enumerate(zip(module.blocks, module.merges), 1):
        parts |= {f"block{i}": block, f"dow{i}": merge}
    if module.flatten is not None:
        parts["dow_out"] = module.flatten
    seen, hooks = watch(parts)
    y = module(x)
    for hook in hooks:
        hook.remove()
    return seen | {"encoded": y.features, "encoded_coords": y.sites.coords}


class Pieces(nn.Module):
    """One operator of each kind, a merging, a pooling, and positions."""

    def __init__(self, dim=32):
        super().__init__()
        own = {"retnet": {"num_heads": 2}}
        names = ("Mamba", "RWKV", "RetNet", "xLSTM", "TTT")
        make = {name: OPERATORS[name.lower()] for name in names}
        self.op = nn.ModuleDict({n: make[n](dim, Place(1, 34), 0.0, **own.get(n.lower(), {})) for n in names})
        self.merge = VoxelMerging(dim, (2, 1, 1), 0.2)
        self.pool = VoxelMerging(dim, (2, 2, 2))
        self.pos = PositionMLP(dim)

    def checkpoint_filter(self, state):
        rules = [
            (r"^op\.Mamba\.norm", "op.Mamba.norm1"),
            (r"sub_conv\.0", "conv"),
            (r"sub_conv\.1", "norm1"),
            (r"^(merge|pool)\.norm\.", r"\1.norm2."),
            (r"position_embedding_head\.", ""),
        ]
        return from_spconv(operators_from_official(rename(state, rules), self), self)


def pieces(module, inputs, manifest):
    where = sites(inputs["voxel_coords"], manifest["grid_size_xyz"])
    noise = torch.from_numpy(recipe.noise("voxel_features", (len(where), 32)).astype("float32"))
    x = SparseTensor(noise.to(module.pos[0].weight), where)
    results = {}
    counts = where.coords[:, 0].bincount()
    for name, shift in (("plain", False), ("shift", True)):
        for axis, axes in (("x", "xyz"), ("y", "yxz")):
            results[f"map_{name}_{axis}"] = window_order(where.coords, (32, 13, 13), axes, shift)
        # The original's table of groups over places in an order: the same for every order.
        table = group_table(torch.arange(len(where)), counts, 64).flatten().long()
        results[f"map_{name}_flat2win"] = torch.where(table < 0, -2 - table, table)
        results[f"map_{name}_win2flat"] = (table >= 0).nonzero()[:, 0]
    merged, results["merge_inverse"] = module.merge(x)
    results |= {"merge": merged.features, "merge_coords": merged.sites.coords}
    sparse = VoxelMerging(32, (2, 1, 1), 0.2, step=2, diagonals=2).to(module.pos[0].weight.dtype)
    sparse.load_state_dict(module.merge.state_dict())
    sparse, _ = sparse(x)
    results |= {"merge_s2d2": sparse.features, "merge_s2d2_coords": sparse.sites.coords}
    pooled, index = module.pool(x)
    results |= {"pool": pooled.features, "pool_coords": pooled.sites.coords, "pool_inverse": index}
    results["expand"] = x.features + pooled.features[index]
    results["pos"] = module.pos(x)
    results |= {f"op_{name}": operator(inputs["sequence"]) for name, operator in module.op.items()}
    return results


def detector(module, inputs, manifest):
    points = inputs["points"]
    counts = points[:, 0].long().bincount().tolist()
    seen = {}
    hooks = [module.encoder.register_forward_hook(lambda m, x, y: seen.update(voxels=y))]
    hooks += [module.backbone.register_forward_hook(lambda m, x, y: seen.update(encoded=y))]
    features = module.features(points[:, 1:], counts)
    for hook in hooks:
        hook.remove()
    results = {
        "voxel_coords": seen["voxels"].sites.coords,
        "voxel_features": seen["voxels"].features,
        "encoded": seen["encoded"].features,
        "encoded_coords": seen["encoded"].sites.coords,
    }
    if module.neck is not None:
        results |= {"bev": seen["encoded"].dense().flatten(1, 2), "spatial_features_2d": features}
    raw = module.head(features)
    if isinstance(raw, list):
        for i, head in enumerate(raw):
            results |= {f"head{i}_{name}": x for name, x in head.items() if name != "sites"}
            results[f"head{i}_heatmap"] = head["hm"]
    elif "cls" in raw:
        names = {"cls": "conv_cls", "box": "conv_box", "dir": "conv_dir_cls"}
        results |= {f"head_{names[name]}": x for name, x in raw.items()}
    else:
        own = {name: x if name == "dense_heatmap" else x.mT for name, x in raw.items() if name != "label"}
        results |= {f"head_{name}": x for name, x in own.items()} | {"query_labels": raw["label"]}
    module.head.decode(raw)
    return results
