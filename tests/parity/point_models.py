"""How to call models of point clouds: module, inputs -> {name in the manifest: tensor}.

The originals sort tokens along their curves; ours stay in stored order, so the tables that ours read by sort them here.
"""

import torch

from linescan.heads.points.mae import draw_patches
from linescan.layers.points import chamfer

from . import recipe


def in_order(tokens, route):
    """Stored tokens (B, L, C) in the order of a route (B, 1, L)."""
    return tokens.gather(1, route[:, 0, :, None].long().expand(-1, -1, tokens.shape[-1]))


def pointmamba(module, inputs):
    points = inputs["input"]
    found = module.group(points)
    x, _, (route,) = module.embed(found)
    tokens = module.patch_embed(found.points)
    orders = module.routes(found.centres)
    results = {"center": found.centres, "group_tokens": tokens}
    if module.order_scale is not None:
        results |= {"order_hilbert": orders[:, 0], "order_hilbert_trans": orders[:, 1]}

    marked = module.mark(tokens[:, None]).expand(-1, module.copies, -1, -1).flatten(1, 2)
    positions = module.pos_mlp(found.centres).repeat(1, module.copies, 1)
    if module.has_class_token:  # the original exchanges the two, whose sum is what counts
        marked = torch.cat([marked, module.cls_pos_embed.expand(len(x), -1, -1)], 1)
        positions = torch.cat([positions, module.cls_token.expand(len(x), -1, -1)], 1)
    assert torch.allclose(marked + positions, x, atol=1e-6)
    results |= {"sequence": in_order(marked, route), "sequence_pos": in_order(positions, route)}

    block = module.blocks[0]
    results["block0_mixer"] = in_order(block.mixer(block.norm1(x), route=route), route)
    results["block0"] = in_order(module.run_unit(block, x, (route,)), route)
    if module.order_scale is None:
        y = x
        for block in module.blocks:
            y = module.run_unit(block, y, (route,))
        results["norm_f"] = in_order(module.norm[0](y), route)
    features = module.forward_features(points)
    pooled = module.forward_head(features, pre_logits=True)
    return results | {"tokens": in_order(features, route), "feature": pooled, "logits": module(points)}


def mamba3d(module, inputs):
    points = inputs["input"]
    found = module.group(points)
    x, _, (positions, neighbours) = module.embed(found)
    block = module.blocks[0]
    y = x + positions
    normed = block.norm1(y)
    local = block.local
    near = normed[:, 1:].gather(1, neighbours.flatten(1)[..., None].expand(-1, -1, x.shape[-1]))
    near = near.unflatten(1, neighbours.shape[1:])
    more = near - normed[:, 1:, None]
    own = normed[:, 1:, None].expand_as(more)
    std = more.std() if local.together else more.std((1, 2, 3), keepdim=True)
    u = torch.cat([more / (std + 1e-5) * local.weight[0] + local.bias[0], own * local.weight[1] + local.bias[1]], -1)
    pooled = (u * u.softmax(2)).sum(2)
    lnp = local(normed, neighbours)
    y = y + lnp
    tokens = module.forward_features(points)
    return {
        "center": found.centres,
        "group_tokens": module.patch_embed(found.points),
        "block0_knorm": u.permute(0, 3, 1, 2),
        "block0_kpool": pooled.mT,
        "block0_lnp": lnp,
        "block0_mixer": block.mixer(block.norm2(y)),
        "block0": block(x, positions, neighbours),
        "tokens": tokens,
        "feature": module.forward_head(tokens, pre_logits=True),
        "logits": module(points),
    }


def parts(module, inputs, manifest):
    points = inputs["points"].mT.contiguous()
    seen = {}
    hook = module.spread[-1].register_forward_hook(lambda m, x, y: seen.setdefault("propagated", y))
    scores = module(points, torch.tensor(manifest["category"]))
    hook.remove()
    trunk = module.trunk
    found = trunk.group(points)
    x, _, (route,) = trunk.embed(found)
    levels = []
    for i, block in enumerate(trunk.blocks):
        x = trunk.run_unit(block, x, (route,))
        if i in module.taps:
            levels.append(x)
    raw = torch.stack([in_order(trunk.norm[0](x), route) for x in levels], 1)
    tokens = torch.cat([in_order(trunk.norm(x), route) for x in levels], -1)
    category = torch.nn.functional.one_hot(torch.tensor(manifest["category"]), module.num_categories).to(points.dtype)
    of_cloud = torch.cat([tokens.amax(1), tokens.mean(1), module.category(category)], -1)
    propagated = seen["propagated"].unflatten(0, (len(points), -1))
    head_input = torch.cat([propagated, of_cloud[:, None].expand(-1, points.shape[1], -1)], -1)
    return {
        "centers": in_order(found.centres.repeat(1, trunk.copies, 1), route).mT,
        "level_tokens": raw,
        "propagated": propagated.mT,
        "head_input": head_input.mT,
        "scores": scores.mT,
        "log_probs": scores.log_softmax(-1),
    }


def mae(module, inputs, manifest):
    points = inputs["input"]
    encoder = module.encoder
    found = encoder.group(points)
    batch, groups = found.centres.shape[:2]
    noise = recipe.noise("mask", (batch, groups), manifest["input"]["salt"])
    noise = torch.from_numpy(noise)
    results = {"mask": draw_patches(noise, 0.6)}
    for curve, name in enumerate(("hilbert", "hilbert_trans")):
        route = encoder.routes(found.centres)[:, curve : curve + 1]
        seen = {}
        hooks = [
            encoder.norm.register_forward_hook(lambda m, x, y: seen.setdefault("x_vis", y)),
            module.blocks[0].register_forward_pre_hook(lambda m, x: seen.setdefault("dec", x[0])),
            module.norm.register_forward_hook(lambda m, x, y: seen.setdefault("x_rec", y)),
        ]
        restored, target = module(points, noise, curve)
        for hook in hooks:
            hook.remove()
        positions = module.pos_mlp(found.centres)
        loss = chamfer(restored.flatten(0, 1), target.flatten(0, 1)).mean()
        values = {
            "center": in_order(found.centres, route),
            "x_vis": seen["x_vis"],
            "dec_in": in_order(seen["dec"] - positions, route),
            "dec_pos": in_order(positions, route),
            "x_rec": seen["x_rec"],
            "points": restored.flatten(0, 1),
            "loss": loss,
        }
        results |= {f"{name}_{key}": value for key, value in values.items()}
    return results
