"""A plugin of mypy: an attribute that only an instance of `nn.Module` knows is Any.

torch declares it a tensor or a module, and so refuses the calls, numbers and lists that modules have.
"""

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny


class Modules(Plugin):
    def get_attribute_hook(self, fullname: str):
        return _anything if fullname.startswith("torch.nn.modules.module.Module.") else None


def _anything(context: AttributeContext) -> Type:
    declared = str(context.default_attr_type).replace("torch._tensor.", "").replace("torch.nn.modules.module.", "")
    return AnyType(TypeOfAny.special_form) if declared == "Tensor | Module" else context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    return Modules
