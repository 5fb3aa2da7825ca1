"""The ClientApp: Flower starts it anew for every message, so all it does is ask the worker.

It imports nothing heavy: a process of a second, where one that loads torch and the base model would
take many, in every round.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hedgerow.engines.flower import app_folder
from hedgerow.engines.flower.messages import Action, Parcel, Request, pack, reading
from hedgerow.engines.flower.node import place_of
from hedgerow.engines.flower.worker import WorkerRequest, ask, inbox
from hedgerow.errors import InvalidMessage

app = ClientApp()


def _relay(message: Message, context: Context) -> Message:
    """Hand a message to this site's worker, and its reply back."""
    try:
        return _relayed(message, dict(context.node_config))
    except InvalidMessage as error:  # which tells the server of nothing but its own message
        raise RuntimeError(f"the site refuses the server's message: {error}") from None
    except Exception as error:
        # Flower sends an exception's text to the server, and its trace to this site's log.
        raise RuntimeError("an error occurred at the site: see its log") from error


def _relayed(message: Message, node: dict[str, str | int | float | bool]) -> Message:
    place = place_of(node)
    place.mkdir(parents=True, exist_ok=True)
    with reading():
        parcel = Parcel(message.content, Request)
    with inbox(place) as folder:
        files = parcel.save_all(folder)
        request = WorkerRequest(app=app_folder(), node=node, request=parcel.words, files=files)
        reply = ask(place, request)
    update = [] if reply.update is None else [reply.update]
    return Message(pack(reply.reply, update), reply_to=message)


for _action in Action:
    _action.register(app, _relay)
