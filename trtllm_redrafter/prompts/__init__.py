"""Prompts, read in the same way by every command: JSON Lines, conversations, chat templates.

`run`, `evaluate`, `bench`, `tune` and `train` accept the same files, since all of them use this package:

    lines = read_lines(path)                                        # jsonl: numbers and objects, or errors
    prompts = parse_all(lines, path, lambda _, line: parse_prompt(line))    # files; messages: text or conversation
    ids = encode_prompt(tokenizer, ChatTemplate.of(tokenizer), prompts[0])  # chat_template: within limits
"""
