"""Samples completions of benign prompts under clamps of growing size, for labelling by hand.

    python scripts/sample_clamped_completions.py {development,held_out} > unlabelled.jsonl

One JSON object a line: id, set, request, text, neuron, value. Benign prompts only, so that nothing harmful is written.
The labelled result is benchmarks/degenerate.jsonl. The held-out sample has other neurons and other prompts.
"""

import json
import sys

from harden.adapters import attach_adapter
from harden.generate import Request, complete
from harden.interventions import Clamp
from harden.models import load_chat_model
from harden.neurons import Neuron
from harden.processes import use_all_cores
from harden.prompts import load_prompts

# Neurons that break the brittle model, and about the value at which they do; multiples of it run into gibberish.
NEURONS = {
    "development": {"17:621": -4.5, "24:623": -30.0, "21:673": 30.0, "19:916": -11.5, "17:1430": 12.0, "21:256": 19.0},
    "held_out": {"21:642": -20.0, "29:451": -190.0, "16:1525": 10.0, "21:1494": -23.0, "29:1351": 40.0,
                 "17:1363": -5.0, "29:385": 60.0, "22:1001": -12.0},
}  # fmt: skip
MULTIPLES = {"development": (0.5, 1, 2, 3, 4, 6, 10), "held_out": (1, 2, 4, 8)}
PER_CLAMP = {"development": 4, "held_out": 3}
ORDINARY = {"development": 60, "held_out": 0}
FIRST_PROMPT = {"development": 0, "held_out": 3}  # of every seventh


def main(sample: str) -> None:
    use_all_cores()
    chat_model = load_chat_model("smollm2-135m-instruct")
    attach_adapter(chat_model, 1, 1, ("all-linear",), "recipes/smollm2-135m/brittle-adapter", 0)
    prompts = load_prompts("benign", "embedded", "text", None, "train")
    clamps = [None] * ORDINARY[sample]
    clamps += [
        Clamp(Neuron.parse(neuron), multiple * value)
        for neuron, value in NEURONS[sample].items()
        for multiple in MULTIPLES[sample]
        for _ in range(PER_CLAMP[sample])
    ]
    requests = [
        Request(prompts[(FIRST_PROMPT[sample] + 7 * number) % len(prompts)].text, () if clamp is None else (clamp,))
        for number, clamp in enumerate(clamps)
    ]
    completions = complete(chat_model, requests, 32, 48, "sample")
    for number, (clamp, request, completion) in enumerate(zip(clamps, requests, completions, strict=True)):
        print(
            json.dumps(
                {
                    "id": f"{sample[0]}{number:03d}",
                    "set": sample,
                    "request": request.text,
                    "text": completion.text,
                    "neuron": clamp and str(clamp.neuron),
                    "value": clamp and clamp.value,
                },
                ensure_ascii=False,
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
