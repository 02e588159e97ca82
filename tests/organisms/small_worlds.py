"""What the tests of the word organisms share: a model that is made at once, and how their files are read."""

import json

TINY = {
    "pretraining": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "steps": 2,
        "batch_size": 4,
    }
}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
