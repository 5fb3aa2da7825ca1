"""Layers with ΔW = s·P·Λ·Q, whose singular values can be cut one by one (AdaLoRA, 2303.10512)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from hedgerow import quantized
from hedgerow.adapter_layers import TRAINED, AdapterLayers
from hedgerow.adapters import PREFIX
from hedgerow.lazy import peft

if TYPE_CHECKING:
    from torch import nn


class SvdLayers(AdapterLayers):
    """peft's layers of AdaLoRA: Q under `lora_A`, Λ under `lora_E`, P under `lora_B`."""

    name: ClassVar[str] = "svd"
    adapts_experts: ClassVar[bool] = False

    def around(
        self,
        layer: Any,
        config: peft.AdaLoraConfig,
        beside: peft.LoraConfig | None = None,
        parameter: str | None = None,
    ) -> Any:
        """Wrap a linear layer.

        Args:
            layer: of the network.
            config: of AdaLoRA, whose `init_r` is the rank.
            beside: None: there is no second adapter beside it.
            parameter: None: there are no experts.
        """
        # A copy, in which peft notes whether the layer's weight is transposed.
        own, options = copy.deepcopy(config), {"r": config.init_r, "lora_alpha": config.lora_alpha}
        options |= quantized.peft_options(layer)
        wrapper = peft.AdaLoraModel._create_new_module(own, TRAINED, layer, **options)
        for part in (wrapper.lora_A, wrapper.lora_E, wrapper.lora_B, wrapper.ranknum):
            part[TRAINED].data = part[TRAINED].data.float()  # whatever the base has
        return wrapper

    def parameters(self, layer: Any, adapter: str, module: str) -> dict[str, nn.Parameter]:
        """Q, P and Λ, which are plain parameters: their names have no `.weight`."""
        names = ("lora_A", "lora_B", "lora_E")
        return {f"{PREFIX}{module}.{what}": getattr(layer, what)[adapter] for what in names}
