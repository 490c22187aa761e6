"""Files of samples for tests of labels."""

import json


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number, responses, prompt=None, temperature=1.0, finished=None):
    return {
        "row": number, "prompt": f"prompt {number}: " if prompt is None else prompt, "temperature": temperature,
        "responses": responses, "tokens": [len(text) + 1 for text in responses],
        "finished": [True] * len(responses) if finished is None else finished,
    }  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
