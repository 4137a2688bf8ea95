"""Prompts, read in the same way by every command: JSON Lines, conversations, chat templates.

`run`, `evaluate`, `bench`, `tune` and `train` accept the same files, since all of them use this package:

    for line in read_lines(path):              # jsonl: lines, with numbers and errors
        prompt = parse_prompt(line.values)     # messages: text or conversation, normalised
        ids = encode_prompt(tokenizer, ChatTemplate.of(tokenizer), prompt)       # chat_template: within limits
"""
