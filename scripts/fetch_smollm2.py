"""Make the demo's base model, SmolLM2-135M-Instruct, as a Hugging Face directory (see `fetch_models.py`).

python scripts/fetch_smollm2.py --output .cache/smollm2-135m-instruct
"""

from __future__ import annotations

import sys

from fetch_models import main

MODEL = "smollm2-135m-instruct"

if __name__ == "__main__":
    sys.exit(main(only=MODEL))
