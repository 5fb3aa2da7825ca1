"""What a judge is asked about answers to MT-bench's questions.

The eight prompts have the names, roles, sections, markers and criteria that are published (Lianmin
Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685, appendix
A); the sentences are our own, and so are the prompts' names in judgments. Compare only scores that
were given with the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# A judgment is found again by its prompt's name: raise the number where a sentence changes.
_CRITERIA = (
    "Take into account how helpful, relevant, accurate, deep, creative and detailed {what}. "
)
_RATING = (
    "Be as objective as you can. When you have given your explanation, rate the response on a "
    'scale from 1 to 10, in strictly this format: "[[rating]]", as in "Rating: [[5]]".'
)
_VERDICT = (
    "The order in which the answers are shown must not influence you, nor their length, nor the "
    "names of the assistants. Be as objective as you can. When you have given your explanation, "
    'state your final verdict in strictly this format: "[[A]]" if assistant A is better, "[[B]]" '
    'if assistant B is better, "[[C]]" for a tie.'
)
_ONE = (
    "Act as an impartial judge, and evaluate the quality of the response that an AI assistant has "
    "given to the user question{s} shown below. "
)
_TWO = (
    "Act as an impartial judge, and evaluate the quality of the responses that two AI assistants "
    "have given to the user question{s} shown below. "
)


class Prompt(NamedTuple):
    """Prompt that a judge is sent."""

    name: str
    system: str
    user: str


def single(questions: Sequence[str], answers: Sequence[str], reference: Sequence[str]) -> Prompt:
    """Ask for a rating of the answer to the last of one or two questions.

    Args:
        questions: the turns up to the one that is judged.
        answers: to each of these.
        reference: the right answers to each of these; none, for a prompt without.
    """
    later = len(questions) > 1
    if reference:
        criteria = (
            "Take into account how correct and helpful the response is. You are given a reference "
            "answer and the assistant's answer. "
        )
        begin = (
            "Begin by comparing the assistant's answer with the reference answer; find and correct "
            "any mistakes. "
        )
    else:
        criteria = _CRITERIA.format(what="the response is")
        begin = "Begin with a short explanation of your evaluation. "
    focus = "Focus on the assistant's answer to the second question. " if later else ""
    task = _ONE.format(s="s" if later else "") + criteria + focus + begin + _RATING
    name = f"hedgerow-single-{'math-' if reference else ''}v1"
    if later:
        conversations = [*_references(questions, reference), _conversation("A", questions, answers)]
        return Prompt(f"{name}-multi-turn", task, "\n\n\n".join(conversations))
    sections = [
        f"[Instruction]\n{task}",
        f"[Question]\n{questions[0]}",
        *([_section("Reference Answer", reference[0])] if reference else []),
        _section("Assistant's Answer", answers[0]),
    ]
    return Prompt(name, "You are a helpful assistant.", "\n\n".join(sections))


def pair(
    questions: Sequence[str], a: Sequence[str], b: Sequence[str], reference: Sequence[str]
) -> Prompt:
    """Ask which of two assistants answers the last of one or two questions better.

    Args:
        questions: the turns up to the one that is judged.
        a: assistant A's answers to each of these.
        b: assistant B's.
        reference: the right answers to each of these; none, for a prompt without.
    """
    later = len(questions) > 1
    if reference:
        criteria = (
            "Take into account how correct and helpful the responses are. You are given a "
            "reference answer, assistant A's answer and assistant B's answer; decide whose answer "
            "is better. "
        )
        begin = (
            "Begin by comparing both assistants' answers with the reference answer; find and "
            "correct any mistakes. "
        )
    else:
        criteria = (
            "Choose the assistant that follows the user's instructions and answers better. "
            + _CRITERIA.format(what="the responses are")
        )
        begin = "Begin by comparing the two responses, with a short explanation. "
    focus = "Focus on who answers the second question better. " if later else ""
    task = _TWO.format(s="s" if later else "") + criteria + focus + begin + _VERDICT
    name = f"hedgerow-pair-{'math-' if reference else ''}v1"
    if later:
        conversations = [
            *_references(questions, reference),
            _conversation("A", questions, a),
            _conversation("B", questions, b),
        ]
        return Prompt(f"{name}-multi-turn", task, "\n\n\n".join(conversations))
    sections = [
        f"[User Question]\n{questions[0]}",
        *([_section("Reference Answer", reference[0])] if reference else []),
        _section("Assistant A's Answer", a[0]),
        _section("Assistant B's Answer", b[0]),
    ]
    return Prompt(name, task, "\n\n".join(sections))


def _section(title: str, text: str) -> str:
    return f"[The Start of {title}]\n{text}\n[The End of {title}]"


def _conversation(assistant: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    title = f"Assistant {assistant}'s Conversation with User"
    return _turns(title, f"Assistant {assistant}", questions, answers)


def _references(questions: Sequence[str], reference: Sequence[str]) -> list[str]:
    if not reference:
        return []
    return [_turns("Reference Answer", "Reference answer", questions, reference)]


def _turns(title: str, who: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    turns = [
        f"### User:\n{question}\n\n### {who}:\n{answer}"
        for question, answer in zip(questions, answers, strict=True)
    ]
    return "\n\n".join([f"<|The Start of {title}|>", *turns, f"<|The End of {title}|>"])
