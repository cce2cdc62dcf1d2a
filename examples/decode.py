"""Decode an export with drafts: a batch, then a stream that shows what each cycle brought.

python examples/decode.py EXPORT [PROMPT …]
"""

import sys

from nextlat_dist import load


def main(export: str, prompts: list[str]) -> None:
    decoder = load(export)
    for found in decoder.generate(prompts, max_new_tokens=32, draft_length=3, temperature=0.8, top_p=0.95, seed=1):
        print(f"{found.text!r}: {found.accepted} of {found.drafted} drafted tokens accepted")
    print("the first again, greedy, cycle by cycle:")
    for piece in decoder.stream(prompts[0], max_new_tokens=32, draft_length=3):
        print(f"tokens {piece.token_ids}, {piece.accepted} of them drafted")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["def main(", "import "])
