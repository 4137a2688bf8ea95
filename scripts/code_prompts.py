"""Prompts to train a coding model's drafter on: many kinds, built from lists of tasks, topics, styles and languages.

    python scripts/code_prompts.py --count 24000 --output prompts.jsonl --held-out-from HumanEval.jsonl.gz

Kinds and their shares stand in `KINDS`; the lists are `data/prompt_parts.json` and, for general questions, the topics
and templates of the SmolLM2 drafter. What a drafter is evaluated on stays out: every prompt that is near one of the
held-out prompts (`Overlap`) is dropped, and how many that were is printed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
EIGHTY = DATA.parent.parent / "trtllm_redrafter" / "benchmark" / "prompts.jsonl"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Parts:
    """The lists, and the draw from them."""

    lists: dict[str, Any]
    draw: random.Random

    def one(self, name: str) -> Any:
        return self.draw.choice(self.lists[name])

    def twist(self) -> str:
        """A further demand, in half of the cases."""
        return f" {self.one('twists')}." if self.draw.random() < 0.5 else ""

    def pick(self, *forms: str) -> str:
        return self.draw.choice(forms)


def load_parts(seed: int) -> Parts:
    lists = json.loads((DATA / "prompt_parts.json").read_text(encoding="utf-8"))
    topics = (DATA / "topics.txt").read_text(encoding="utf-8")
    lists["topics"] = [t.strip() for t in re.split(r"[;\n]", topics) if t.strip()]
    lists["templates"] = (DATA / "templates.txt").read_text(encoding="utf-8").splitlines()
    return Parts(lists, random.Random(seed))


STUB_FORMS = (
    "{stub}",
    "```python\n{stub}```",
    "Complete the following Python function.\n\n```python\n{stub}```",
    "Complete this function:\n\n{stub}",
    "Write a solution to the following problem:\n```python\n{stub}```",
    "Implement the body of this function.\n```python\n{stub}    pass\n```",
    "Please finish this Python code and explain it briefly.\n\n```python\n{stub}```",
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```\n{stub}```",
)
"""How people hand a function to complete to a model; `{stub}` ends with a line break."""


def wrapped_stub(stub: str, draw: random.Random) -> str:
    return draw.choice(STUB_FORMS).format(stub=stub.rstrip("\n") + "\n")


def stub(p: Parts) -> str:
    """A signature and a docstring, as in a file that someone is in the middle of writing."""
    f = p.one("functions")
    typed = p.draw.random() < 0.7
    args = f["args"] if typed else re.sub(r": [^,]*(\[[^\]]*\])*[^,]*", "", f["args"])
    arrow = f" -> {f['returns'].replace(' or ', ' | ')}" if typed else ""
    task = f["task"][0].upper() + f["task"][1:]
    twist = f"\n    {p.one('twists')}." if p.draw.random() < 0.4 else ""
    quotes = p.pick('"""', '"""', "'''")
    header = p.pick("", "", "", "from typing import List\n\n\n", "import math\n\n\n") if typed else ""
    name = p.pick(f["name"], f["name"], "solve", "process", f"my_{f['name']}", "f")
    return wrapped_stub(f"{header}def {name}({args}){arrow}:\n    {quotes}{task}.{twist}\n    {quotes}\n", p.draw)


def function(p: Parts) -> str:
    task, language = p.one("functions")["task"], p.one("languages")
    return p.pick(
        f"Write a {language} function to {task}.", f"Implement a function in {language} that can {task}.",
        f"How do I {task} in {language}?", f"In {language}, {task}.", f"Show me {language} code to {task}.",
        f"I need to {task}. Can you help me in {language}?",
        f"Write a {language} program that reads its input from the user to {task}.",
    ) + p.twist()  # fmt: skip


def signature(p: Parts) -> str:
    f = p.one("functions")
    call = f"{f['name']}({f['args']})"
    return p.pick(
        f"Write a Python function `{call}` to {f['task']}.", f"Write `{call} -> {f['returns']}` to {f['task']}.",
        f"Implement {call} in Python: {f['task']}.", f"Fill in the TODO:\n\ndef {call}:\n    # TODO: {f['task']}\n",
        f"Write unit tests for a Python function `{call}` that should {f['task']}.",
        f"Write a docstring with examples for `{call}`, whose job it is to {f['task']}.",
        f"Translate this idea to {p.one('languages')}: a function {f['name']} to {f['task']}.",
        f"What are edge cases of a function to {f['task']}?", f"What is the fastest way to {f['task']}, and why?",
    ) + p.twist()  # fmt: skip


def class_(p: Parts) -> str:
    what, language = p.one("classes"), p.one("languages")
    return p.pick(
        f"Write a {language} class for {what}.", f"Implement {what} in {language}.", f"Design {what} in {language}.",
        f"Create {what} in {language} and show how to use it.", f"Write {what} in {language} with unit tests.",
        f"Sketch the methods of a class for {what}, then implement them in {language}.",
    ) + p.twist()  # fmt: skip


def explain(p: Parts) -> str:
    concept, language = p.one("concepts"), p.one("languages")
    return p.pick(
        f"Explain {concept} with an example in {language}.", f"What is meant by {concept}? {p.one('styles')}.",
        f"When should I care about {concept}?", f"Explain {concept}. {p.one('styles')}.",
        f"What are common mistakes with {concept}?", f"Compare {concept} and {p.one('concepts')}.",
        f"Ask me three interview questions on {concept} and answer them.", f"How does {language} handle {concept}?",
    )  # fmt: skip


def debug(p: Parts) -> str:
    code = p.one("bugs")
    ask = p.pick(
        "What is wrong with this code?", "Find the bug and fix it.", "Why does this not work?", "Review this code.",
        "Refactor this code and explain the changes.", "Explain what this code does.", "Add comments to this code.",
        "Write tests for this code.", f"Rewrite this in {p.one('languages')}.", "Make this code more readable.",
        "What does this print, and why?", "Improve the error handling of this code.",
    )  # fmt: skip
    return p.pick(f"{ask}\n\n{code}", f"{ask}\n\n```\n{code}\n```", f"{code}\n\n{ask}") + p.twist()


def other_code(p: Parts) -> str:
    language = p.one("languages")
    library, task = p.one("libraries").split("|")
    return p.pick(
        f"Write a SQL query for tables with {p.one('sql')}: {p.one('queries')}.",
        f"Given {p.one('sql')}, {p.one('queries')}. Use PostgreSQL.",
        f"Write a shell script to {p.one('shell')}.", f"Give me a bash one-liner to {p.one('shell')}.",
        f"Write a regular expression for {p.one('regexes')} and explain it.",
        f"Write a {language} function that finds {p.one('regexes')} in a text with a regular expression.",
        f"Build {p.one('web')} with {p.one('frameworks')}.", f"Write an endpoint for {p.one('endpoints')} with "
        f"{p.one('frameworks')}.", f"Write a command-line tool in {language} to {p.one('cli')}.",
        f"Use {library} to {task}.", f"Show an example of how to {task} with {library}.",
    ) + p.twist()  # fmt: skip


def partial(p: Parts) -> str:
    """Code that breaks off: a class with a first method, a script with a plan in comments."""
    f, g = p.one("functions"), p.one("functions")
    what = p.one("classes").split(" ", 1)[1]
    name = "".join(word.capitalize() for word in re.findall(r"[a-z]+", what)[:2])
    return p.pick(
        f"Continue this code:\n\nclass {name}:\n    \"\"\"{what.capitalize()}.\"\"\"\n\n    def __init__(self):\n",
        f"Complete the script.\n\n# 1. {f['task']}\n# 2. {g['task']}\n\ndef {f['name']}({f['args']}):\n",
        f"def {f['name']}({f['args']}):\n    # {f['task']}\n",
        f"import sys\n\ndef main():\n    # read arguments, {f['task']}, print the result\n",
        f"```python\ndef {f['name']}({f['args']}):\n    \"\"\"{f['task']}\"\"\"\n\n"
        f"def test_{f['name']}():\n```\nFinish it.",
        f"// {f['task']}\nfunction {f['name']}(",
    )  # fmt: skip


def sums(p: Parts) -> str:
    a, c = p.draw.sample(p.lists["names"], 2)
    k, m = p.draw.randint(2, 7), p.draw.randint(2, 9)
    numbers = {"x": p.draw.randint(8, 60), "y": p.draw.randint(80, 900), "p": p.draw.randint(10, 55), "k": k, "m": m}
    text: str = p.one("sums").format(a=a, c=c, g=p.one("goods"), b=p.draw.randint(20, 90), **numbers)
    return text + " " + p.pick("Explain step by step.", "Show your work.", "Explain.", "Show how you get there.", "")


def language_task(p: Parts) -> str:
    passage, sentence = p.one("passages"), p.one("sentences")
    asked = p.pick(*(f"What is said about {w}?" for w in re.findall(r"[a-z]{6,}", passage)[:6]), "When?", "How many?")
    return p.pick(
        f"Translate into {p.one('tongues')}: {sentence}", f"Translate to {p.one('tongues')}.\n\n{passage}",
        f"Summarize the text in {p.pick('one sentence', 'two sentences', 'three bullet points')}.\n\n{passage}",
        f"Rewrite this for a child.\n\n{passage}", f"Give the text a title and explain your choice.\n\n{passage}",
        f"Answer from the text only.\n\n{passage}\n\nQuestion: {asked}",
        "Answer with the notes below and name the one you used.\n\n"
        + "\n".join(f"({i}) {s}" for i, s in enumerate(p.draw.sample(p.lists["sentences"], 3), 1))
        + f"\n\nQuestion: Who or what is {sentence.split(' ', 1)[0].lower()} about in note {p.draw.randint(1, 3)}?",
        f"Correct and improve this sentence: {sentence.replace('the ', '', 1)}",
        f"Write a story that ends with this sentence: {sentence}",
    )  # fmt: skip


def general(p: Parts) -> str:
    if p.draw.random() < 0.4:
        text: str = p.one("requests").format(who=p.one("who"), what=p.one("what"))
    else:
        text = p.one("templates").format(p.one("topics"))
    return text + (f" {p.one('styles')}." if p.draw.random() < 0.3 else "")


def turns(p: Parts) -> Messages:
    """A second question after a first answer; the answer stands for one the user has seen."""
    f, language = p.one("functions"), p.one("languages")
    call = f["name"]
    args = re.sub(r": [^,]*(\[[^\]]*\])*[^,]*", "", f["args"])
    first = p.pick(f"Write a Python function to {f['task']}.", f"How would you {f['task']}?")
    answer = f"Here is an outline:\n\n```python\ndef {call}({args}):\n    # {f['task']}\n    ...\n```"
    then = p.pick(
        "Now write it out in full.", f"Can you do it in {language}?", "Add tests, please.", "What is its complexity?",
        f"Thanks. {p.one('twists')}.", "I get an error when the input is empty. Why?", "Make it faster.",
        "Explain it to a beginner.", "Wrap it in a command-line tool.", "Turn it into a class.",
    )  # fmt: skip
    if p.draw.random() < 0.4:
        topic = p.one("topics")
        first, answer = f"Tell me something about {topic}.", f"{topic[0].upper()}{topic[1:]}: where shall I begin?"
        then = p.pick("At the beginning, please.", f"{p.one('styles')}.", p.one("templates").format("it"))
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, (first, answer, then), strict=True)]


KINDS: dict[str, tuple[int, Callable[[Parts], str | Messages]]] = {
    "stub": (22, stub), "function": (14, function), "signature": (10, signature), "partial": (5, partial),
    "class": (6, class_), "explain": (7, explain), "debug": (5, debug), "other code": (10, other_code),
    "maths": (5, sums), "language": (5, language_task), "general": (8, general), "turns": (3, turns),
}  # fmt: skip
"""Shares in percent."""


def text_of(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


class Overlap:
    """Nearness to held-out prompts: a run of `run` words in common, the same function name, or most rare 3-grams.

    Case, punctuation and layout do not count.
    """

    def __init__(self, held_out: Iterable[str], *, run: int = 8, share: float = 0.5) -> None:
        self._run, self._share = run, share
        self._runs: set[tuple[str, ...]] = set()
        self._names: set[str] = set()
        self._texts: list[set[tuple[str, ...]]] = []
        for text in held_out:
            self._runs |= _grams(text, run)
            self._names |= set(re.findall(r"\bdef (\w+)\(", text))
            self._texts.append(_grams(text, 3))
        self._where: dict[tuple[str, ...], list[int]] = {}
        for i, grams in enumerate(self._texts):
            for gram in grams:
                self._where.setdefault(gram, []).append(i)

    def why(self, text: str) -> str | None:
        """Why the text is near a held-out one; None: it is not."""
        if _grams(text, self._run) & self._runs:
            return f"{self._run} words in a row"
        if any(re.search(rf"\b{name}\b", text) for name in set(re.findall(r"\w+", text)) & self._names if "_" in name):
            return "function name"
        own = _grams(text, 3)
        hits = Counter(i for gram in own for i in self._where.get(gram, ()))
        near = any(n >= self._share * min(len(own), len(self._texts[i])) for i, n in hits.items())
        return "3-grams" if near and len(own) > 3 else None


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def held_out_texts(paths: Sequence[Path]) -> list[str]:
    """Prompts of JSON-lines files, gzipped or not: `prompt`, or the user turns of `messages`."""
    found = []
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for line in data.decode().splitlines():
            row = json.loads(line)
            turns = [m["content"] for m in row.get("messages", []) if m["role"] == "user"]
            found += [row["prompt"]] if "prompt" in row else turns
    return found


def build(count: int, seed: int, overlap: Overlap) -> tuple[list[dict[str, Any]], Counter[str]]:
    """`count` different prompts in random order, as lines of a prompts file, and what was dropped for which reason."""
    p, dropped, found = load_parts(seed), Counter[str](), dict[str, dict[str, Any]]()
    names, shares = list(KINDS), [share for share, _ in KINDS.values()]
    while len(found) < count:
        kind = p.draw.choices(names, shares)[0]
        prompt = KINDS[kind][1](p)
        text = text_of(prompt)
        if text in found:
            dropped["twice"] += 1
            if dropped["twice"] > 20 * count:
                raise SystemExit(f"error: the lists give no {count} different prompts")
        elif (why := overlap.why(text)) is not None:
            dropped[why] += 1
        else:
            content = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
            found[text] = {**content, "category": kind}
    return list(found.values()), dropped


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held-out-from", type=Path, action="append", default=[], help="besides the eighty prompts")
    args = parser.parse_args()
    overlap = Overlap(held_out_texts([EIGHTY, *args.held_out_from]))
    rows, dropped = build(args.count, args.seed, overlap)
    args.output.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    kinds = Counter(row["category"] for row in rows)
    print(json.dumps({"prompts": len(rows), "kinds": kinds, "dropped": dropped}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
