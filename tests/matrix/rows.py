"""The rows that clients learn from and that models are asked: short ones beside long ones."""

from __future__ import annotations

CLIENTS = {
    "north": [
        {"instruction": "Say a", "output": "aaa"},
        {"instruction": "Say b, and then say c", "output": "b and c"},
        {"instruction": "Count", "output": "1, 2, 3, 4"},
    ],
    "south": [
        {"instruction": "Name a pet that lives in a house.", "output": "A cat."},
        {"instruction": "x", "output": "y"},
    ],
}
"""Each client's rows."""
TEST = [
    {
        "instruction": "Which of these is a pet, and lives in a house?",
        "output": "cat",
        "choices": ["cat", "a wild bear"],
        "answer": 0,
    },
    {"instruction": "Say b", "output": "bbb", "choices": ["aa", "bbb", "c"], "answer": "B"},
    {
        "instruction": "Count down",
        "output": "4, 3, 2, 1, 0",
        "choices": ["1, 2", "4, 3, 2, 1, 0"],
        "answer": 1,
    },
    {"instruction": "z", "output": "z", "choices": ["z", "zz"], "answer": 0},
    {"instruction": "Say d, f", "output": "d, f", "choices": ["d", "d, f", "f"], "answer": 1},
]
"""Test rows, each with options; two pairs of prompts of equal length, the others differ."""
PROMPT = "{instruction}\n\n"
"""What the template `plain` makes of an instruction."""
MAX_NEW_TOKENS = 6
"""Longest greedy answer."""
