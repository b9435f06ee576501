"""Calls of the golden data of quantisation: functions, not models. module, inputs -> {name in the manifest: tensor}."""

import torch
from torch import nn

from linescan.quantise.hadamard import hadamard, klt, rotate
from linescan.quantise.quantisers import Grid, MinMax, MovingPercentile, Percentile, Quantiser, Weight, fit_grid, limits
from linescan.quantise.transforms import smoothing


class OneLinear(nn.Module):
    """Of the Karhunen-Loeve basis."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(48, 8)


class NormAndLinear(nn.Module):
    """Of smoothing."""

    def __init__(self):
        super().__init__()
        self.ln, self.fc = nn.LayerNorm(48), nn.Linear(48, 96)


def hadamards(module, inputs, manifest):
    x, signs = inputs["x"], inputs["signs"].sign()
    n, names = x.shape[-1], [entry["name"] for entry in manifest["outputs"]]
    found = {name: hadamard(int(name[1:])).to(x) for name in names if name.startswith("H")}
    return found | {f"x{n}_H": rotate(x), f"signs{n}": hadamard(n, signs).to(x)}


def karhunen_loeve(module, inputs):
    x, mix = inputs["x"], inputs["mix"]
    x = x @ (mix * torch.logspace(0, -2, x.shape[-1], dtype=x.dtype)[:, None]) + 0.3
    covariance = x.double().T.cov()
    K = klt(covariance).to(x)
    return {
        "activation": x,
        "abs_K": K.abs(),
        "eigenvalues": (K.T.double() @ covariance @ K.double()).diagonal(),
        "variance_raw": x.var(0),
        "variance_hadamard": rotate(x).var(0),
        "variance_klt": (x @ K).var(0),
        "variance_klt_hadamard": rotate(x @ K).var(0),
        "abs_weight_klt": (module.lin.weight @ K).abs(),
    }


def smooth(module, inputs):
    x, act, ln, fc = inputs["x"], inputs["act"].abs(), module.ln, module.fc
    before = fc(ln(x))
    s = smoothing(act, fc.weight.abs().amax(0), least=1e-5).to(x)
    results = {"scales": s, "ln_weight": ln.weight / s, "ln_bias": ln.bias / s, "fc_weight": fc.weight * s}
    after = nn.functional.layer_norm(x, x.shape[-1:], results["ln_weight"], results["ln_bias"], ln.eps)
    return results | {"output_before": before, "output": after @ results["fc_weight"].T + fc.bias}


def quantiser(module, inputs):
    act, weight = (inputs[name].float() for name in ("act", "weight"))  # the original ran in float32
    dynamic = Quantiser(8, scales="sample")
    grid = dynamic.grid(act)
    results = {"act_dynamic8": dynamic(act)}
    results |= {"act_dynamic8_scale": grid.scale.flatten(), "act_dynamic8_zero": grid.zero.flatten()}
    for bits in (8, 4):
        rows = Weight(weight, bits, axes=1, symmetric=False)
        rows.freeze()
        results[f"weight_channel{bits}"] = rows()
        results[f"weight_channel{bits}_scale"] = rows.scale.flatten()
        results[f"weight_channel{bits}_zero"] = rows.zero.flatten() + 2 ** (bits - 1)
        observer = Percentile()
        observer.update(weight)
        whole = fit_grid(*observer.range(), bits, symmetric=False)
        results[f"weight_tensor{bits}_percentile"] = whole(weight)
        results[f"weight_tensor{bits}_percentile_scale"] = whole.scale.reshape(1)
    for observer in ("minmax", "percentile"):
        static = Quantiser(8, observer=observer)
        static.mode = "observe"
        for factor in (1, 1.2, 1.4):
            static(factor * act)
        static.settle()
        static.mode = "on"
        name = f"act_static8_{observer}"
        results |= {name: static(act), f"{name}_scale": static.scale, f"{name}_zero": static.zero}
    return results


def quamba(module, inputs):
    x, weight = inputs["x"].float(), inputs["weight"].float()

    def observed(observer, symmetric=True, clip=1.0):
        for batch in x:
            observer.update(batch)
        least, most = observer.range()
        return fit_grid(clip * least, clip * most, 8, symmetric, smallest=1e-6)

    results = {}
    for share in (0.9995, 0.99999):
        results[f"percentile_{share}_scale"] = observed(MovingPercentile(share)).scale.reshape(1)
    both = observed(MovingPercentile(0.9995, signed=True), symmetric=False)
    results |= {"percentile_asym_scale": both.scale.reshape(1), "percentile_asym_base": both.zero.reshape(1)}
    results["minmax_scale"] = observed(MinMax()).scale.reshape(1)
    clipped = observed(MinMax(), symmetric=False, clip=0.9)
    results |= {"minmax_asym_clip_scale": clipped.scale.reshape(1), "minmax_asym_clip_base": clipped.zero.reshape(1)}
    for bits in (8, 4):
        rounded = Weight(weight, bits, axes=0, symmetric=True)
        rounded.freeze()
        codes, scale, _ = rounded.integers()
        results |= {f"weight{bits}": codes.view_as(weight).float(), f"weight{bits}_scale": scale.reshape(1)}
    results["qact"] = truncated(x[0], Grid(torch.tensor(0.05), torch.zeros(1), *limits(8, True)))
    return results


def truncated(x, grid):
    """What Quamba does where it does not rotate: towards zero."""
    return (x / grid.scale).clamp(grid.low, grid.high).trunc()
