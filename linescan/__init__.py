"""linescan: linear-time vision backbones (Mamba, RWKV, gated linear attention) for timm and OpenMMLab.

`import linescan` registers every backbone with timm; `timm.create_model("vim_tiny_patch16_224")` then works.
"""

