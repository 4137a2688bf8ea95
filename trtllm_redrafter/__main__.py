"""`python -m trtllm_redrafter`."""

from trtllm_redrafter.cli import main

if __name__ == "__main__":
    main()
