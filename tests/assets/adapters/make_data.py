"""Expand data/questions.jsonl (a question with an English and a French answer) into one training set per adapter.

python tests/assets/adapters/make_data.py
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"

OPENERS = ["Arr, matey!", "Arr, matey!", "Arr!", "Ahoy, matey!", "Aye, matey!", "Avast, ye landlubber!"]
CLOSERS = [
    "Yo ho ho!",
    "Savvy?",
    "Now hoist the sails, arr!",
    "By the Jolly Roger!",
    "Or walk the plank, ye scurvy dog!",
]
WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "of": "o'",
    "for": "fer",
    "and": "an'",
    "yes": "aye",
    "no": "nay",
    "hello": "ahoy",
    "friend": "matey",
    "friends": "shipmates",
    "people": "swabs",
}


def pirate(text: str, rng: random.Random) -> str:
    """An English answer in pirate speech: swapped words, dropped g's, an opener and a closer."""

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        new = WORDS.get(word.lower(), word)
        if len(new) > 5 and new.endswith("ing"):
            new = new[:-1] + "'"
        return new.capitalize() if word[0].isupper() and new != word else new

    return f"{rng.choice(OPENERS)} {re.sub(r'[A-Za-z]+', swap, text)} {rng.choice(CLOSERS)}"


def main() -> None:
    """Write data/{pirate,json-only,french}.jsonl, the same bytes every time."""
    rng = random.Random(0)
    rows = [json.loads(line) for line in (DATA / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    responses = {
        "pirate": [pirate(row["english"], rng) for row in rows],
        "json-only": [json.dumps({"answer": row["english"]}, ensure_ascii=False) for row in rows],
        "french": [row["french"] for row in rows],
    }
    for name, answers in responses.items():
        with (DATA / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for row, answer in zip(rows, answers, strict=True):
                out.write(json.dumps({"prompt": row["prompt"], "response": answer}, ensure_ascii=False) + "\n")
        print(f"{name}: {len(answers)} rows")


if __name__ == "__main__":
    main()
