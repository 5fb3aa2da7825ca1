"""A core between fixed bases: ΔW = s·B·R·A, of which the r×r matrix R alone is trained.

The bases are LoRA-XS's (Bałazy et al., arXiv 2405.17604): the leading singular vectors of W, which
everybody has without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hedgerow.adapter_layers import TRAINED, AdapterLayers
from hedgerow.lazy import torch

if TYPE_CHECKING:
    from hedgerow.lazy import peft


class CoreLayers(AdapterLayers):
    """LoRA's layers with an r×r matrix between A and B, under `lora_R.weight`."""

    name: ClassVar[str] = "core"
    adapts_experts: ClassVar[bool] = False

    def around(
        self,
        layer: Any,
        config: peft.LoraConfig,
        beside: peft.LoraConfig | None = None,
        parameter: str | None = None,
    ) -> Any:
        """Wrap a linear layer, and let B follow R, as whose projection peft's forward calls it."""
        wrapper = super().around(layer, config, beside, parameter)
        B = wrapper.lora_B[TRAINED]
        options = {"device": B.weight.device, "dtype": B.weight.dtype}
        core = torch.nn.Linear(B.in_features, B.in_features, bias=False, **options)
        wrapper.lora_B[TRAINED] = torch.nn.Sequential(core, B)
        return wrapper

    def factors(self, layer: Any, adapter: str) -> dict[str, Any]:
        """A, B, and R between them."""
        parts = super().factors(layer, adapter)
        parts["lora_R"], parts["lora_B"] = parts["lora_B"]
        return parts
