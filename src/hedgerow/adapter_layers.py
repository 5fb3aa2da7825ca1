"""What an adapter puts around the layers that it adapts; LoRA's are here, others where they belong.

A kind of layers says how a layer is wrapped, and which of the wrapper's parameters have which of
PEFT's key names. Methods whose adapters are of another kind hand it to `Model.attach`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from hedgerow import quantized
from hedgerow.adapters import PREFIX
from hedgerow.lazy import peft

if TYPE_CHECKING:
    from torch import nn

TRAINED, FROZEN = "default", "frozen"
"""peft's names of the adapter that a client trains, and of one beside it."""


class AdapterLayers:
    """LoRA's layers, as peft has them: ΔW = s·B·A."""

    name: ClassVar[str] = "lora"
    """Name of the kind: layers of one kind and configuration are made once, and used again."""
    adapts_experts: ClassVar[bool] = True
    """Whether experts that a model keeps as parameters can be adapted, beside linear layers."""

    def around(
        self,
        layer: Any,
        config: peft.LoraConfig,
        beside: peft.LoraConfig | None = None,
        parameter: str | None = None,
    ) -> Any:
        """Wrap a layer, or another wrapper, with uninitialised parameters in float32.

        Args:
            layer: of the network, which stays as it is.
            config: peft's configuration of the adapter.
            beside: that of a second, frozen adapter beside it.
            parameter: name of the layer's parameter that holds experts; None of a linear layer.
        """
        options = {"r": config.r, "lora_alpha": config.lora_alpha, "parameter_name": parameter}
        options |= quantized.peft_options(layer)
        wrapper = peft.LoraModel._create_new_module(config, TRAINED, layer, **options)
        if beside is not None:
            wrapper.update_layer(FROZEN, beside.r, lora_alpha=beside.lora_alpha, config=beside)
        for adapter in wrapper.lora_A:
            for part in (wrapper.lora_A[adapter], wrapper.lora_B[adapter]):
                part.float()  # whatever the base has
            if parameter is not None:
                from hedgerow import experts

                experts.split(wrapper, adapter)
        return wrapper

    def parameters(self, layer: Any, adapter: str, module: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter in a layer that is wrapped, by PEFT's key names.

        Args:
            layer: as `around` has made it.
            adapter: peft's name of the adapter.
            module: name of the layer in the network.
        """
        if isinstance(layer, peft.tuners.lora.ParamWrapper):
            from hedgerow import experts

            return {
                f"{PREFIX}{matrix}.{what}.weight": factor
                for matrix, what, factor in experts.factors_of(layer, adapter, module)
            }
        parts = self.factors(layer, adapter)
        return {f"{PREFIX}{module}.{what}.weight": part.weight for what, part in parts.items()}

    def factors(self, layer: Any, adapter: str) -> dict[str, Any]:
        """The linear layers that an adapter of a linear layer consists of, by peft's names."""
        return {what: getattr(layer, what)[adapter] for what in ("lora_A", "lora_B")}


LORA = AdapterLayers()


def nested(layer: Any) -> Iterator[Any]:
    """A wrapped layer, and the wrapped ones inside it."""
    while isinstance(layer, peft.tuners.lora.LoraLayer):
        yield layer
        layer = layer.base_layer
