"""Four stories, one of them not in ASCII, as the bytes of a text file: for the tests of text, shards and `prepare`."""

from moemla.tokenizer import EOT

STORIES = [
    "Once there was a cat.\nThe cat had a hat.",
    "Tim saw a 😀 balloon. “Wow!” he said.",
    "The dog ran to the big tree and back.",
    "A bird sang. A fox listened. They were friends.",
]


def text_of(stories: list[str]) -> bytes:
    return "".join(f"{story}\n{EOT}\n" for story in stories).encode()
