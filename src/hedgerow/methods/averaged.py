"""Dense updates of all parameters, averaged: what FedAvg and its relatives share."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from hedgerow.methods.composed import Composed, Parts
from hedgerow.methods.parts.codec import ChosenCodec
from hedgerow.methods.parts.dense import Dense
from hedgerow.methods.parts.feedback import Feedback
from hedgerow.methods.parts.gathered import Gathered
from hedgerow.methods.parts.plain import Plain
from hedgerow.methods.parts.uplink import Uplink


class AveragedWeights(Composed):
    """All parameters; codecs, error feedback and a server optimiser are options."""

    compresses_broadcast: ClassVar[bool] = True

    up: ChosenCodec = None
    """Codec of updates: `bits`, `top_k`, or one with options, as {name: top_k, k: 64}; with null,
    they are sent as they are."""
    down: ChosenCodec = None
    """Codec of the broadcast, as `up` has it; with null, it is sent as it is."""
    gather: bool = False
    """Whether the broadcast has every client's update as it came, for everybody to add up, instead
    of their mean: for `up` codecs with which all of them together are smaller than it."""
    error_feedback: Feedback = False
    """Whether clients add to their updates what their codec has lost of earlier ones: `true`, or a
    factor for what is owed, above 0, with which it is forgotten. A client keeps a vector of the
    model's size in float32 on disk."""
    broadcast_feedback: Feedback = False
    """Whether the server adds to its broadcast what its codec has lost of earlier ones; as
    `error_feedback` has it."""

    @model_validator(mode="after")
    def _feedback_of_codecs(self) -> AveragedWeights:
        if self.gather and (self.up is None or self.down is not None):
            raise ValueError(
                "`gather`: the broadcast has updates as they came: give `up`, and no `down`"
            )
        for key, codec in (("error_feedback", "up"), ("broadcast_feedback", "down")):
            chosen = getattr(self, codec)
            if getattr(self, key) and not (chosen and chosen.error):
                raise ValueError(
                    f"`{key}`: `{codec}` loses nothing: give another codec, or `{key}: false`"
                )
        return self

    @property
    def parts(self) -> Parts:
        """Dense changes in these codecs."""
        up = self.up or Plain()
        return Parts(
            up=Uplink(
                through=Gathered() if self.gather else Dense(),
                codec=up,
                feedback=float(self.error_feedback) or None,
            ),
            down=up if self.gather else self.down or Plain(),
            feedback_down=float(self.broadcast_feedback) or None,
            server=self.server,
        )
