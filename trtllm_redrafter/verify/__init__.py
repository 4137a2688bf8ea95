"""Check checkpoints and engines: files, weights, tokens and steps, each against what it should be.

| module | question |
|---|---|
| `files` | is every file there, unchanged, and what config.json says? |
| `weights` | are the values those of the base model, drafter or checkpoint it was made from? |
| `tokens` | does a checkpoint, run here, write what transformers writes, from the same logits? |
| `gate` | does an engine compute what its checkpoint says: tokens, logits, drafts and steps? |
| `inspect` | what is in a directory? |
"""
