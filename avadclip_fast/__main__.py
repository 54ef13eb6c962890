"""`python -m avadclip_fast` is the command `avadclip-fast`."""

from .cli import main

if __name__ == "__main__":
    main()
