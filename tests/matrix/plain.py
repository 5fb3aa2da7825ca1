"""A process that has transformers and peft, and no hedgerow: what others make of an export.

It reads a request a line, as JSON, and answers each by a line. What it computes is as plain as it
gets: one text at a time, without padding, cache or batches, and a cross-entropy in float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Reader:
    """The process, from the side of whoever asks it; it starts at the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def read(self, **request: Any) -> dict[str, Any]:
        """What a model says of rows: `nats`, `tokens`, `answers`, `options`, or an `error`.

        Args:
            request: `model`, a folder; `adapter`, one beside it or None; `rows`, `prompt` and
                `max_new_tokens`, as `rows.py` has them.
        """
        if self._process is None:
            # Without the folder of this file on its path, and without hedgerow's.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def main() -> None:
    """Answer until there are no more questions."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = _say(**json.loads(line))
            assert "hedgerow" not in sys.modules
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}
        print(json.dumps(answer), file=out, flush=True)


def _say(
    model: str, adapter: str | None, rows: list[dict[str, Any]], prompt: str, max_new_tokens: int
) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    # A base may be stored in few bits; what is exported whole says itself what it is.
    options = {} if adapter is None else {"dtype": torch.float32}
    # The part that reads text, unless there is none that can be loaded by itself.
    config = type(transformers.AutoConfig.from_pretrained(model))
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = transformers.AutoModelForCausalLM
    if config not in causal or causal[config].config_class not in causal:
        kind = transformers.AutoModelForImageTextToText
    network = kind.from_pretrained(model, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    kind = type(network).__name__
    if adapter is not None:
        # What transformers or peft do not recognise, they leave out with a warning.
        network = peft.PeftModel.from_pretrained(network, adapter)
    network.eval()

    def ids(row: dict[str, Any], answer: str) -> tuple[list[int], list[int]]:
        asked = tokenizer(prompt.format(**row))["input_ids"]
        return asked, tokenizer(answer, add_special_tokens=False)["input_ids"]

    def nats(asked: list[int], said: list[int]) -> float:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([asked + said])).logits[0].double()
        losses = -logits.log_softmax(-1)
        places = range(len(asked) - 1, len(asked) + len(said) - 1)
        return sum(float(losses[p, token]) for p, token in zip(places, said, strict=True))

    found: dict[str, Any] = {"class": kind, "nats": [], "tokens": 0, "answers": [], "options": []}
    for row in rows:
        asked, said = ids(row, row["output"])
        said = [*said, tokenizer.eos_token_id]
        found["nats"].append(nats(asked, said))
        found["tokens"] += len(said)
        found["options"].append([-nats(*ids(row, choice)) for choice in row["choices"]])
        found["answers"].append(_answer(network, tokenizer, asked, max_new_tokens))
    return found | ({} if adapter is None else {"left out": _left_out(network, Path(adapter))})


def _answer(network: Any, tokenizer: Any, asked: list[int], max_new_tokens: int) -> str:
    """The greedy answer, each token from the whole text before it."""
    import torch

    said: list[int] = []
    while len(said) < max_new_tokens and tokenizer.eos_token_id not in said:
        with torch.no_grad():
            said.append(int(network(input_ids=torch.tensor([asked + said])).logits[0, -1].argmax()))
    text: str = tokenizer.decode(said, skip_special_tokens=True)
    return text


def _left_out(network: Any, adapter: Path) -> list[str]:
    """Tensors of an adapter's file that are not, or not as they are, in the network that has it."""
    import peft
    from safetensors.torch import load_file

    have = peft.get_peft_model_state_dict(network)
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [n for n, t in tensors.items() if n not in have or not bool((have[n] == t).all())]


if __name__ == "__main__":
    main()
